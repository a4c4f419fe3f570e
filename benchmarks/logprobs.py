"""The cost of logprobs that nobody asks for, beside those that vLLM is asked for and a gateway that asks for them.

As in `benchmarks/serving.py`, all turns are taken by one server process. Its engine core is ours all the time: there
logprobs are packed for an API server of ours. The Rust frontend, at whose engine core nothing can be turned on and off,
is two servers side by side: one that is recorded, and one that is not instrumented.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.gateway import gateway, is_up
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.serving import CHAT, CONCURRENCY, IDS, TOKENS, Client, Load, environment, rounds_of, session
from tests.common.rust_frontend import rust_frontend
from tests.common.vllm import RemoteOpenAIServer, side_by_side

STARTS, SECONDS = 2, 100
QUICK_STARTS, QUICK_SECONDS = 1, 40
MIN_ROUNDS = 15
"""Seconds for all starts together, however slow the machine is."""
PATH = "/v1/chat/completions"
RECORDS, AGAIN, LOGPROBS = "recording", "recording, again", "recording, with AGL_LOGPROBS=on"
ASKED, GATEWAY = "vLLM, asked for ids and logprobs", "a gateway that asks for ids and logprobs"
POSITIONS = {RECORDS: "on", AGAIN: "on", LOGPROBS: "logprobs", ASKED: "marked", GATEWAY: "marked"}
ASKS = {"return_token_ids": True, "logprobs": True}
RUST, RUST_RECORDED = "the Rust frontend", "the Rust frontend, recorded"
ABOUT = (
    f"Chat completions of {TOKENS} tokens by a tiny model, {CONCURRENCY} at once, recorded to SQLite. The second turn "
    "of recording shows what is read where nothing differs. CPU time is judged by its instructions, in counted."
)

Round = Mapping[str, Load]


def measure(quick: bool) -> Part:
    """A server in turns, then two with the Rust frontend; and again."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: list[Round] = []
    rust: list[Round] = []
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        for start in range(starts):
            say(f"logprobs: starting a server, {start + 1} of {starts}")
            env = {**environment(seed=start), "AGL_INSTRUMENT": "1", "AGL_STORE": str(Path(folder, f"{start}.db"))}
            with RemoteOpenAIServer("--middleware=benchmarks.switch.Switch", env=env) as server:
                say("logprobs: recording with and without them")
                with gateway(server, "logprobs") as url, busy.running():
                    rounds += asyncio.run(take_turns(url, server, seconds))
            say(f"logprobs: starting two servers with the Rust frontend, {start + 1} of {starts}")
            with busy.running():
                rust += measured_rust(start, Path(folder, f"rust-{start}.db"), seconds)
    return Part("Logprobs", ABOUT, [*of_python(rounds), *of_rust(rust)], busy.share_of_others())


async def take_turns(url: str, server: RemoteOpenAIServer, seconds: float) -> list[Round]:
    """The server alone, and behind the gateway."""
    request = {"model": server.model, **CHAT}
    bodies = {name: {**request, **(ASKS if name == ASKED else {})} for name in POSITIONS}
    async with session(server.url) as straight, session(url) as through:
        await is_up(through)
        clients = {
            name: Client(through if name == GATEWAY else straight, server.process.pid, PATH, bodies, POSITIONS)
            for name in POSITIONS
        }
        for name, client in clients.items():
            await client.turn(name)
            await client.check(name, IDS, name != GATEWAY)
            await client.check(name, b'"logprobs":{', name == ASKED)
        return await rounds_of(clients, seconds, MIN_ROUNDS)


def measured_rust(start: int, path: Path, seconds: float) -> list[Round]:
    """Seconds for two servers, which are started at once."""
    rust = {
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": str(rust_frontend()),
        **environment(seed=start),
    }
    servers = {
        RUST: RemoteOpenAIServer(env={**rust, "AGL_INSTRUMENT": "0"}),
        RUST_RECORDED: RemoteOpenAIServer(env={**rust, "AGL_INSTRUMENT": "1", "AGL_STORE": str(path)}),
    }
    with ExitStack() as stack:
        stack.enter_context(side_by_side(*servers.values()))
        return asyncio.run(turns_of_rust(servers, seconds))


async def turns_of_rust(servers: Mapping[str, RemoteOpenAIServer], seconds: float) -> list[Round]:
    """The same for both."""
    async with session(servers[RUST].url) as alone, session(servers[RUST_RECORDED].url) as recorded:
        clients = {}
        for name, each in ((RUST, alone), (RUST_RECORDED, recorded)):
            body = {"model": servers[name].model, **CHAT, "return_token_ids": True}
            clients[name] = Client(each, engine_core(servers[name]), PATH, {name: body}, {})
            await clients[name].turn(name)
            await clients[name].check(name, IDS)
        return await rounds_of(clients, seconds, MIN_ROUNDS)


def engine_core(server: RemoteOpenAIServer) -> int:
    """The process id of a server's one engine core."""
    [found] = [
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "EngineCore" in process.name() + " ".join(process.cmdline())
    ]
    return found


def of_python(rounds: Sequence[Round]) -> list[Section]:
    names = (RECORDS, AGAIN, LOGPROBS, ASKED)
    rates = {name: [each[name].rate for each in rounds] for name in (*names, GATEWAY)}
    cpu = {name: [each[name].cpu for each in rounds] for name in names}
    at_least = Target(0.97, at_least=True)
    return [
        Section(
            "throughput",
            "requests a second",
            "",
            [
                Row.of(name, values, rates[RECORDS], at_least if name == LOGPROBS else None)
                for name, values in rates.items()
            ],
        ),
        Section(
            "throughput, to the gateway's",
            "requests a second",
            "The gateway is benchmarks/proxy.py. A ratio is to it.",
            [
                Row.of(GATEWAY, rates[GATEWAY], rates[GATEWAY]),
                Row.of(LOGPROBS, rates[LOGPROBS], rates[GATEWAY], Target(2, at_least=True)),
            ],
        ),
        Section(
            "CPU time of the API server",
            "ms a request",
            "",
            [Row.of(name, values, cpu[RECORDS]) for name, values in cpu.items()],
        ),
    ]


def of_rust(rounds: Sequence[Round]) -> list[Section]:
    rates = {name: [each[name].rate for each in rounds] for name in (RUST, RUST_RECORDED)}
    cpu = {name: [each[name].cpu / TOKENS * 1e3 for each in rounds] for name in (RUST, RUST_RECORDED)}
    at_least = Target(0.97, at_least=True)
    return [
        Section(
            title,
            unit,
            "",
            [
                Row.of(name, values, measured[RUST], target if name == RUST_RECORDED else None)
                for name, values in measured.items()
            ],
        )
        for title, unit, measured, target in (
            ("throughput, the Rust frontend", "requests a second", rates, at_least),
            ("CPU time of the engine core, the Rust frontend", "µs a token", cpu, None),
        )
    ]
