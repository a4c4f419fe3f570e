"""What the patches cost a server while it serves.

Three real servers with the tiny model, side by side: vLLM, a second such vLLM, and vLLM with `AGL_INSTRUMENT=1`. The
first two are asked for `return_token_ids` by every request, the third is asked for nothing, and all answer with the
same ids. What would make such numbers lie, and what is done about it:

- The machine is faster at one moment than at the next. So a load is short, one server after the other takes its own, in
  another order each round, never two at once, and only ratios within a round count: hundreds of them.
- Two processes of the same program differ, by where things lie in their memory. So the servers are started again and
  again, with another hash seed each time but the same for all three; and the second vLLM shows what is left of it:
  what it differs by from the first is what the method reads when nothing differs.
- CPU time is that of the API server's process alone, where the patches are. The engine is a process of its own, and so
  is the client, this one.
- A tiny model and short answers leave as little work to hide in as there can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import aiohttp
import psutil

from benchmarks.machine import BusyMeter, cpu_seconds
from benchmarks.report import Part, Row, Section, Target, say
from tests.common.vllm import RemoteOpenAIServer

STARTS, SECONDS = 4, 120
QUICK_STARTS, QUICK_SECONDS = 1, 40
MIN_ROUNDS = 5
"""Of each start, however slow the machine is."""
CONCURRENCY = 64
REQUESTS = 128
TOKENS = 32

VLLM, AGAIN, ARMED = "vLLM", "vLLM, a second server", "vLLM, AGL_INSTRUMENT=1"
MODES = {"plain answers": False, "streamed answers": True}

ABOUT = (
    f"Chat completions of {TOKENS} tokens by a tiny model, {CONCURRENCY} at once. A run is {REQUESTS} requests to one "
    "server while the others wait. Every request asks vLLM for ids; with AGL_INSTRUMENT=1 none does. The second server "
    "shows what is read where nothing differs. "
    "All but CPU time is judged only where the quartiles of its ratios are within 3 %."
)


@dataclass(frozen=True)
class Load:
    """What one load on one server took."""

    cpu: float
    rate: float
    median: float
    slowest: float


MEASURES = (
    ("CPU time of the API server", "ms a request", Target(1.02)),
    ("throughput", "requests a second", Target(0.98, at_least=True, max_spread=0.03)),
    ("latency, p50", "ms", Target(1.02, max_spread=0.03)),
    ("latency, p99", "ms", Target(1.02, max_spread=0.03)),
)
"""Of a `Load`, in its order: what it is, its unit and what its ratio should be."""

Rounds = list[Mapping[str, Load]]


def measure(quick: bool) -> Part:
    """Start the servers, load them for a while, and all over again."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: dict[str, Rounds] = {mode: [] for mode in MODES}
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    for start in range(starts):
        say(f"serving: starting the servers, {start + 1} of {starts}")
        with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
            servers = new_servers(seed=start)
            list(pool.map(stack.enter_context, servers.values()))
            for mode, streamed in MODES.items():
                say(f"serving: {mode}")
                with busy.running():
                    rounds[mode] += asyncio.run(take_turns(servers, streamed, seconds / len(MODES)))
    sections = [section for mode in MODES for section in tables(mode, rounds[mode])]
    return Part("Serving", ABOUT, sections, busy.share_of_others())


def new_servers(seed: int) -> dict[str, RemoteOpenAIServer]:
    # A connection that waits for its turn is kept open: opening it again would cost more than what is measured.
    env = {"PYTHONHASHSEED": str(seed), "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    return {
        VLLM: RemoteOpenAIServer(env=env),
        AGAIN: RemoteOpenAIServer(env=env),
        ARMED: RemoteOpenAIServer(env={**env, "AGL_INSTRUMENT": "1"}),
    }


async def take_turns(servers: Mapping[str, RemoteOpenAIServer], streamed: bool, seconds: float) -> Rounds:
    """Load each in turn until the time is over; the first rounds, in which a server warms up, are not among them."""
    rounds: Rounds = []
    order = list(servers)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        clients = {name: Client(client, server, name != ARMED, streamed) for name, server in servers.items()}
        for name in order * 3:
            await clients[name].load()
        for name in order:
            await clients[name].check()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or len(rounds) < MIN_ROUNDS:
            random.shuffle(order)
            rounds.append({name: await clients[name].load() for name in order})
    return rounds


class Client:
    """Sends one server the same request over and over."""

    def __init__(self, client: aiohttp.ClientSession, server: RemoteOpenAIServer, asks: bool, streamed: bool) -> None:
        self._client = client
        self._url = f"{server.url}/v1/chat/completions"
        self._pid = server.process.pid
        request = {
            "model": server.model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed,
            **({"return_token_ids": True} if asks else {}),
        }
        self._body = json.dumps(request).encode()

    async def load(self) -> Load:
        """All requests, so many at once."""
        seconds: list[float] = []
        left = iter(range(REQUESTS))

        async def one_after_the_other() -> None:
            for _ in left:
                started = time.perf_counter()
                await self._answer()
                seconds.append(time.perf_counter() - started)

        cpu, started = cpu_seconds(self._pid), time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(CONCURRENCY)))
        elapsed, cpu = time.perf_counter() - started, cpu_seconds(self._pid) - cpu
        hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
        return Load(cpu / REQUESTS * 1e3, REQUESTS / elapsed, hundredths[49] * 1e3, hundredths[98] * 1e3)

    async def check(self) -> None:
        """Lest something else be measured than answers with ids."""
        answer = await self._answer()
        if b'"prompt_token_ids":[' not in answer or b'"token_ids":[' not in answer:
            raise RuntimeError(f"{self._url} answers without ids: {answer[:1000]!r}")

    async def _answer(self) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with self._client.post(self._url, data=self._body, headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{self._url} answers {response.status}: {answer[:1000]!r}")
            return answer


def tables(mode: str, rounds: Sequence[Mapping[str, Load]]) -> list[Section]:
    sections = []
    for number, (what, unit, target) in enumerate(MEASURES):
        measured = {name: [astuple(each[name])[number] for each in rounds] for name in (VLLM, AGAIN, ARMED)}
        rows = [
            Row.of(name, values, measured[VLLM], target if name == ARMED else None) for name, values in measured.items()
        ]
        sections.append(Section(f"{what}, {mode}", unit, "", rows))
    return sections
