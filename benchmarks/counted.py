"""The instructions that a request takes, counted: of the API server, and of the engine core.

CPU time on shared cores swings by more than what is to be measured; instructions do not. How that is kept exact, under
a valgrind that makes a process fifty times slower, is in `benchmarks/paced.py`: the engine core waits for the API
server at each step. All modes of a workload are turns of one server process, of which every patch can be taken off. A
second server has vLLM's turns alone: what differs between the two is what the method reads where nothing differs.

The kernel's own work is not counted, nor is waiting. What both cost is in the timed benchmarks.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks import callgrind
from benchmarks.callgrind import Callgrind
from benchmarks.counted_core import TOKENS as CORE_TOKENS
from benchmarks.lightning_store import HOST, agl_store
from benchmarks.machine import BusyMeter
from benchmarks.paced import END, OFF, PACE, STORES, TURN, Pace
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.serving import CHAT, IDS, MESSAGE, PROMPT, RESPONSE, Workload, environment
from tests.common.vllm import QUIET, RemoteOpenAIServer, without_agl

LONG = 128
"""Tokens of a streamed answer; of a plain one 32."""
ROUNDS = 2
ONE, MANY = 1, 32
REQUESTS = {ONE: 16, MANY: 32}
"""Requests of a turn, by how many there are at once."""
QUICK_REQUESTS = {ONE: 8}

INSTRUMENTED, FILE, STORE, LOGPROBS = "instrumented", "file", "store", "logprobs"
LABELS = {
    OFF: "vLLM",
    INSTRUMENTED: "instrumented",
    FILE: "recording to a file",
    STORE: "recording to agl store",
    LOGPROBS: "recording to a file, AGL_LOGPROBS=on",
    "continuation": "recording to a file, AGL_CONTINUE=on",
    "sampling": "recording to a file, AGL_SAMPLING=temperature=0.7,top_p=0.9",
}
AGAIN = "vLLM, from a second start"
EVERY, FEW = tuple(LABELS), (OFF, INSTRUMENTED, FILE)
RECORDING = {False: 1.04, True: 1.02}
"""The most that recording may take, of a plain answer and of a streamed one."""

COMPLETION = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
ASKS = {"return_token_ids": True}
WORKLOADS = [
    Workload(f"{name}, {'streamed' if stream else 'plain'}", path, {**body, **length, "stream": stream}, (), asks)
    for name, path, body, limit, asks in (
        ("chat", "/v1/chat/completions", CHAT, "max_tokens", ASKS),
        ("completions", "/v1/completions", COMPLETION, "max_tokens", ASKS),
        ("Responses", "/v1/responses", RESPONSE, "max_output_tokens", {}),
        ("Messages", "/v1/messages", MESSAGE, "max_tokens", {}),
    )
    for stream in (False, True)
    for length in ({limit: LONG} if stream else {},)
]

ABOUT = (
    "Instructions in user space, of all threads of a process, for a request (or a token); by callgrind. A tiny model, "
    f"plain answers of 32 tokens and streamed ones of {LONG}, one at a time and {MANY} at once. The engine core waits "
    "for the API server at each step, so that each of a stream's tokens is an event of its own. Where vLLM has ids to "
    "give (chat, completions) it is asked for them. What a turn has recorded "
    f"({' or '.join(map(str, REQUESTS.values()))} generations) is written in one transaction, with one report to the "
    "store: as a server does it that answers 64 or 128 requests a second."
)

Counts = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """The turns of one table: a workload, and how many requests there are at once."""

    workload: Workload
    at_once: int
    modes: Sequence[str]

    @property
    def title(self) -> str:
        return f"{self.workload.name}, {'one at a time' if self.at_once == ONE else f'{self.at_once} at once'}"

    @property
    def is_streamed(self) -> bool:
        return bool(self.workload.body["stream"])


def missing() -> str:
    """Return why it cannot be measured here."""
    return callgrind.missing()


def measure(quick: bool) -> Part:
    """Count the requests of two servers at once, then the tokens of an engine core."""
    rounds, requests = (1, QUICK_REQUESTS) if quick else (ROUNDS, REQUESTS)
    cells = [
        Cell(workload, at_once, EVERY if workload.name.startswith("chat") else FEW)
        for workload in (WORKLOADS[:1] if quick else WORKLOADS)
        for at_once in requests
    ]
    vllms = [Cell(cell.workload, cell.at_once, (OFF,)) for cell in cells]
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder, ThreadPoolExecutor() as pool, busy.running():
        first = pool.submit(count_server, Path(folder, "first"), cells, rounds, requests)
        second = pool.submit(count_server, Path(folder, "second"), vllms, 1, requests)
        core = pool.submit(count_core, Path(folder, "core"), rounds, requests)
        counted, again = first.result(), second.result()
        sections = [table(cell, counted[cell.title], again[cell.title][OFF]) for cell in cells]
        try:
            sections += [core_table(at_once, counts) for at_once, counts in core.result().items()]
        except RuntimeError as error:
            say(f"counted: {error}")
            sections.append(Section("the engine core", skipped="not counted: it ended under valgrind"))
    return Part("Counted instructions", ABOUT, sections, busy.share_of_others())


def count_server(folder: Path, cells: Sequence[Cell], rounds: int, requests: Mapping[int, int]) -> dict[str, Counts]:
    """Start a server, and return the millions of instructions of a request in each of its turns."""
    with ExitStack() as stack:
        folder.mkdir()
        store = stack.enter_context(agl_store(folder / "store.db", folder / "store.log"))
        Pace.make(folder / "pace")
        env = {
            **environment(seed=0),
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
            "AGL_INSTRUMENT": "1",
            # Of the engine core, which records what an API server that is not instrumented sends to it.
            "AGL_STORE": str(folder / "core.db"),
            PACE: str(folder / "pace"),
            STORES[FILE]: str(folder / "file.db"),
            STORES[STORE]: f"http://{HOST}:{store.port}",
        }
        counter = Callgrind(folder)
        server = RemoteOpenAIServer(
            "--middleware=benchmarks.paced.PacedSwitch",
            "--scheduler-cls=benchmarks.paced.PacedScheduler",
            "--no-async-scheduling",
            env=env,
        )
        server.command = [*counter.prefix, sys.executable, *server.command]
        say("counted: starting a server under valgrind")
        stack.enter_context(server)
        counter.pid = server.process.pid
        return asyncio.run(Turns(server, counter).all(cells, rounds, requests))


class Turns:
    """Takes the turns of one server."""

    def __init__(self, server: RemoteOpenAIServer, counter: Callgrind) -> None:
        self._server = server
        self._counter = counter
        self._events: dict[str, int] = {}

    async def all(self, cells: Sequence[Cell], rounds: int, requests: Mapping[int, int]) -> dict[str, Counts]:
        """Take every turn of every cell, so many rounds."""
        counted: dict[str, Counts] = {}
        limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=3600)
        async with aiohttp.ClientSession(
            self._server.url, connector=limits, timeout=aiohttp.ClientTimeout()
        ) as session:
            self._session = session
            # So that the server waits for its engine by our function from the first turn on.
            await self._get(f"{TURN}{OFF}?0")
            await self._answer(cells[0].workload, OFF)
            self._counter.begin()
            for cell in cells:
                counts: dict[str, list[float]] = defaultdict(list)
                for _ in range(rounds):
                    for mode in cell.modes:
                        counts[mode].append(await self._turn(cell, mode, requests[cell.at_once]))
                        say(f"counted: {cell.title}, {LABELS[mode]}: {counts[mode][-1]:.3f} millions")
                counted[cell.title] = counts
        return counted

    async def _turn(self, cell: Cell, mode: str, requests: int) -> float:
        await self._get(f"{TURN}{mode}?{cell.at_once}")
        # What was patched is looked up anew.
        await self._wave(cell, mode)
        await self._get(END)
        self._counter.zero()
        for _ in range(requests // cell.at_once):
            await self._wave(cell, mode)
        await self._get(END)
        return self._counter.millions() / requests

    async def _wave(self, cell: Cell, mode: str) -> None:
        answers = await asyncio.gather(*(self._answer(cell.workload, mode) for _ in range(cell.at_once)))
        for answer in answers:
            events = answer.count(b"data:")
            # The same text always. Responses have no event for a token that ends within a character.
            is_fixed = cell.is_streamed and "ignore_eos" in cell.workload.body
            if is_fixed and events != self._events.setdefault(cell.title, max(events, LONG * 3 // 4)):
                raise RuntimeError(f"{cell.title}: tokens of a stream came together: {answer[-1000:]!r}")
            if (IDS in answer) is not (mode != OFF or bool(cell.workload.asks)):
                raise RuntimeError(f"{cell.title}, {LABELS[mode]}: {answer[-1000:]!r}")

    async def _get(self, path: str) -> None:
        async with self._session.get(path) as response:
            response.raise_for_status()

    async def _answer(self, workload: Workload, mode: str) -> bytes:
        body = {"model": self._server.model, **workload.body, **(workload.asks if mode == OFF else {})}
        async with self._session.post(workload.path, json=body) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{workload.path} answers {response.status}: {answer[:1000]!r}")
            return answer


def count_core(folder: Path, rounds: int, requests: Mapping[int, int]) -> dict[int, Counts]:
    """Start an engine core, and return the millions of instructions of a token in each turn."""
    folder.mkdir()
    counter = Callgrind(folder)
    counted: dict[int, Counts] = {}
    say("counted: starting an engine core under valgrind")
    with core_program(folder, counter) as ask:
        for at_once, number in requests.items():
            counts: dict[str, list[float]] = defaultdict(list)
            for _ in range(rounds):
                for mode in (OFF, FILE, LOGPROBS):
                    ask(f"{mode} {at_once} {number // at_once}", "ready")
                    counter.begin()
                    counter.zero()
                    ask("go", "done")
                    counts[mode].append(counter.millions() / number / CORE_TOKENS)
                    say(f"counted: the engine core, {LABELS[mode]}: {counts[mode][-1]:.3f} millions")
            counted[at_once] = counts
    return counted


@contextmanager
def core_program(folder: Path, counter: Callgrind) -> Iterator[Callable[[str, str], None]]:
    """Start `benchmarks.counted_core`; yield a function that says a line to it, and waits for a word."""
    command = [*counter.prefix, sys.executable, "-m", "benchmarks.counted_core"]
    env = {**without_agl(psutil.Process().environ()), **QUIET, **environment(seed=0)}
    # valgrind knows no AVX-512, which torch looks for by itself.
    env |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    env |= {
        STORES[FILE]: str(folder / "file.db"),
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": sys.executable,
    }
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )
    counter.pid = program.pid
    assert program.stdin
    assert program.stdout
    to, of = program.stdin, program.stdout

    def ask(line: str, word: str) -> None:
        to.write(f"{line}\n")
        to.flush()
        if not any(re.search(f"counted_core: {word}$", said.rstrip()) for said in of):
            raise RuntimeError(f"the engine core has ended:\n{(folder / 'log').read_text()[-5000:]}")

    try:
        yield ask
    finally:
        program.kill()
        program.wait()


def table(cell: Cell, counts: Counts, again: Sequence[float]) -> Section:
    """Make the table of a workload; recording with logprobs is compared with recording."""
    most = RECORDING[cell.is_streamed]
    limits = {INSTRUMENTED: 1.01, FILE: most, STORE: most}
    vllm = counts[OFF]
    rows = [
        Row.of(LABELS[mode], counts[mode], vllm, Target(limits[mode]) if mode in limits else None)
        for mode in cell.modes
    ]
    rows.insert(1, Row.of(AGAIN, again, vllm[: len(again)]))
    if LOGPROBS in counts:
        label = f"{LABELS[LOGPROBS]}, to recording without"
        rows.append(Row.of(label, counts[LOGPROBS], counts[FILE], Target(1.03)))
    return Section(cell.title, "millions", "", rows)


def core_table(at_once: int, counts: Counts) -> Section:
    """Make the table of the engine core."""
    limits = {FILE: 1.02, LOGPROBS: 1.04}
    rows = [
        Row.of(LABELS[mode], values, counts[OFF], Target(limits[mode]) if mode in limits else None)
        for mode, values in counts.items()
    ]
    how = "one at a time" if at_once == ONE else f"{at_once} at once"
    about = f"A token, of requests that come as from the Rust frontend: {CORE_TOKENS} tokens each."
    return Section(f"the engine core, {how}", "millions", about, rows)
