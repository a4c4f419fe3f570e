"""The cost of the patches for a server while it serves.

One real server with the tiny model, whose process is instrumented and not in turns (`benchmarks/switch.py`). What would
make such numbers lie, and what is done about it:

- The machine is faster at one moment than at the next. So a load is short, the turns of a round follow each other in
  another order each time, and only ratios within a round count: hundreds of them.
- Two processes of the same program differ by more than what is to be seen. So all turns are taken by one. It is started
  again a few times, with another hash seed: what holds in one memory layout may not in another.
- What is left of all this is shown: vLLM takes two turns a round, and what the second differs by from the first is what
  the method reads when nothing differs.
- CPU time is that of the API server's process alone, where the patches are. The engine is a process of its own, and so
  is the client, this one.
- A tiny model and short answers leave as little work to hide in as there can be.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.machine import BusyMeter, cpu_seconds
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.switch import ROUTE
from tests.common.vllm import RemoteOpenAIServer

STARTS, SECONDS = 2, 360
QUICK_STARTS, QUICK_SECONDS = 1, 60
MIN_ROUNDS = 5
"""Seconds for each start, however slow the machine is."""
CONCURRENCY = 64
REQUESTS = 128
TOKENS = 32

VLLM, AGAIN, OURS = "vLLM", "vLLM, again", "vLLM, instrumented"
IDS = b'token_ids":['
PROMPT = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": PROMPT}]

ABOUT = (
    f"Answers of {TOKENS} tokens by a tiny model, {CONCURRENCY} at once. A turn is {REQUESTS} requests to one server "
    "process, in which vLLM is instrumented for the turn, or is not. There a chat request asks vLLM for ids, and here "
    "it does not; for Responses and Messages vLLM has none. The second turn of vLLM shows what is read where nothing "
    "differs. What is judged is judged only where the quartiles of its ratios are within 3 %; CPU time by its "
    "instructions, in counted."
)


@dataclass(frozen=True)
class Turn:
    """The requests of a turn.

    Attributes:
        concurrency: requests at once.
        warm_up: the first requests, which are not measured: what was patched is looked up anew.
    """

    requests: int = REQUESTS
    concurrency: int = CONCURRENCY
    warm_up: int = 32


@dataclass(frozen=True)
class Load:
    """The time that one load on the server took.

    Attributes:
        client: the share of a core that sending it took, and reading the answers.
    """

    cpu: float
    rate: float
    median: float
    slowest: float
    client: float


@dataclass(frozen=True)
class Measure:
    """One number of a `Load`: what it is, its unit and what its ratio should be, if it is judged."""

    field: str
    what: str
    unit: str
    target: Target | None = None


@dataclass(frozen=True)
class Workload:
    """One kind of requests.

    Attributes:
        asks: what a request says besides where it is vLLM that is to answer with ids.
    """

    name: str
    path: str
    body: Mapping[str, Any]
    measures: tuple[Measure, ...]
    asks: Mapping[str, Any] = field(default_factory=dict)


CPU = Measure("cpu", "CPU time of the API server", "ms a request")
"""Judged by its instructions, in `benchmarks/counted.py`."""

OF_CHAT = (
    CPU,
    Measure("rate", "throughput", "requests a second", Target(0.98, at_least=True, max_spread=0.03)),
    Measure("median", "latency, p50", "ms", Target(1.02, max_spread=0.03)),
    Measure("slowest", "latency, p99", "ms", Target(1.02, max_spread=0.03)),
)
CHAT = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
RESPONSE = {"input": PROMPT, "max_output_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
MESSAGE = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
WORKLOADS = [
    workload
    for mode, stream in (("plain", {"stream": False}), ("streamed", {"stream": True}))
    for workload in (
        Workload(f"chat, {mode}", "/v1/chat/completions", {**CHAT, **stream}, OF_CHAT, {"return_token_ids": True}),
        Workload(f"Responses, {mode}", "/v1/responses", {**RESPONSE, **stream}, (CPU,)),
        Workload(f"Messages, {mode}", "/v1/messages", {**MESSAGE, **stream}, (CPU,)),
    )
]

Round = Mapping[str, Load]


def measure(quick: bool) -> Part:
    """Start a server, load it for a while, and all over again."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: dict[str, list[Round]] = {workload.name: [] for workload in WORKLOADS}
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    for start in range(starts):
        say(f"serving: starting a server, {start + 1} of {starts}")
        with RemoteOpenAIServer("--middleware=benchmarks.switch.Switch", env=environment(seed=start)) as server:
            for workload in WORKLOADS:
                say(f"serving: {workload.name}")
                with busy.running():
                    rounds[workload.name] += asyncio.run(take_turns(server, workload, seconds / len(WORKLOADS)))
    sections = [
        table(workload, measure, rounds[workload.name]) for workload in WORKLOADS for measure in workload.measures
    ]
    return Part("Serving", ABOUT, sections, busy.share_of_others())


def environment(seed: int) -> dict[str, str]:
    # The server is vLLM's own script, which does not look for modules in the folder that it is started in.
    return {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[1])}


async def take_turns(server: RemoteOpenAIServer, workload: Workload, seconds: float) -> list[Round]:
    """Load it in turns until the time is over; the first, in which a server warms up, are not among them."""
    rounds: list[Round] = []
    order = [VLLM, AGAIN, OURS]
    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client.of(workload, session, server)
        for name in order:
            await client.turn(name)
            await client.check(name, IDS, name == OURS or bool(workload.asks))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or len(rounds) < MIN_ROUNDS:
            random.shuffle(order)
            rounds.append({name: await client.turn(name) for name in order})
    return rounds


class Client:
    """Sends a server the same request over and over.

    Args:
        session: leads to the server.
        pid: the process whose CPU time counts.
        path: the route.
        bodies: the request, for each kind of turn.
        positions: of the server's switch, for each kind of turn; none of a server that has none.
        size: of a turn.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pid: int,
        path: str,
        bodies: Mapping[str, Any],
        positions: Mapping[str, str],
        size: Turn = Turn(),
    ) -> None:
        self._session = session
        self._pid = pid
        self._path = path
        self._bodies = {name: json.dumps(body).encode() for name, body in bodies.items()}
        self._positions = positions
        self._size = size

    @classmethod
    def of(cls, workload: Workload, session: aiohttp.ClientSession, server: RemoteOpenAIServer) -> Client:
        """One for vLLM and us in turns."""
        request = {"model": server.model, **workload.body}
        bodies = {name: request if name == OURS else {**request, **workload.asks} for name in (VLLM, AGAIN, OURS)}
        positions = {VLLM: "off", AGAIN: "off", OURS: "on"}
        return cls(session, server.process.pid, workload.path, bodies, positions)

    async def turn(self, name: str) -> Load:
        """Turn the server, and load it."""
        if self._positions:
            async with self._session.get(f"{ROUTE}{self._positions[name]}") as response:
                response.raise_for_status()
        await self._requests(name, self._size.warm_up)
        cpu, client, started = cpu_seconds(self._pid), time.process_time(), time.perf_counter()
        seconds = await self._requests(name, self._size.requests)
        elapsed, client = time.perf_counter() - started, time.process_time() - client
        cpu = cpu_seconds(self._pid) - cpu
        hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
        return Load(
            cpu=cpu / self._size.requests * 1e3,
            rate=self._size.requests / elapsed,
            median=hundredths[49] * 1e3,
            slowest=hundredths[98] * 1e3,
            client=client / elapsed,
        )

    async def check(self, name: str, shows: bytes, does: bool = True) -> None:
        """Lest something else be measured than answers that show this, or do not."""
        answer = await self._answer(name)
        if (shows in answer) is not does:
            raise RuntimeError(f"{self._path} of {name} answers: {answer[:1000]!r}")

    async def _requests(self, name: str, number: int) -> list[float]:
        """So many, as many at once as there may be, and the seconds that each took."""
        seconds: list[float] = []
        left = iter(range(number))

        async def one_after_the_other() -> None:
            for _ in left:
                started = time.perf_counter()
                await self._answer(name)
                seconds.append(time.perf_counter() - started)

        await asyncio.gather(*(one_after_the_other() for _ in range(self._size.concurrency)))
        return seconds

    async def _answer(self, name: str) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._path, data=self._bodies[name], headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{self._path} answers {response.status}: {answer[:1000]!r}")
            return answer


async def rounds_of(clients: Mapping[str, Client], seconds: float, at_least: int) -> list[Round]:
    """Turns of all of them, in another order each time, until the time is over and there are so many."""
    rounds: list[Round] = []
    order = list(clients)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(rounds) < at_least:
        random.shuffle(order)
        rounds.append({name: await clients[name].turn(name) for name in order})
    return rounds


def session(url: str) -> aiohttp.ClientSession:
    # Servers close a connection that has been idle for five seconds, as between two turns it may be.
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2))


def table(workload: Workload, measure: Measure, rounds: Sequence[Round]) -> Section:
    measured = {name: [getattr(each[name], measure.field) for each in rounds] for name in (VLLM, AGAIN, OURS)}
    rows = [
        Row.of(name, values, measured[VLLM], measure.target if name == OURS else None)
        for name, values in measured.items()
    ]
    return Section(f"{measure.what}, {workload.name}", measure.unit, "", rows)
