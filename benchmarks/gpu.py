"""The cost of the patches for a server on a GPU, as users start one, with a model of half a billion weights.

As in `benchmarks/logprobs.py`, all turns are taken by one server process, whose engine core is ours. On a GPU the
engine is so quick that it may be the API server, or the client, that sets the pace: each table of throughput has one
beside it of what kept a core busy.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.gateway import gateway, is_up
from benchmarks.machine import BusyMeter, gpus
from benchmarks.report import Part, Row, Section, Summary, Target, say
from benchmarks.serving import CHAT, IDS, Client, Load, Turn, environment, rounds_of, session
from tests.common.tiny_model import small_model
from tests.common.vllm import RemoteOpenAIServer

SECONDS, QUICK_SECONDS = 100, 20
"""Seconds for each kind of load."""
MIN_ROUNDS, QUICK_MIN_ROUNDS = 10, 3
TOKENS = 128
PATH = "/v1/chat/completions"
ARGUMENTS = ("--max-model-len", "4096", "--middleware=benchmarks.switch.Switch")

VLLM, AGAIN, LOGPROBS_ASKED = (
    "vLLM, asked for ids",
    "vLLM, asked for ids, again",
    "vLLM, asked for ids and logprobs",
)
RECORDS, LOGPROBS = "recording", "recording, with AGL_LOGPROBS=on"
GATEWAY = "a gateway that asks for ids"
POSITIONS = {
    VLLM: "marked",
    AGAIN: "marked",
    RECORDS: "on",
    LOGPROBS: "logprobs",
    LOGPROBS_ASKED: "marked",
    GATEWAY: "marked",
}
IDS_ASKED = {"return_token_ids": True}
ASKS = {VLLM: IDS_ASKED, AGAIN: IDS_ASKED, LOGPROBS_ASKED: {**IDS_ASKED, "logprobs": True}}
"""Fields that a request has besides."""
TARGETS = {"rate": Target(0.97, at_least=True), "cpu": Target(1.05)}
"""Bounds of what recording may cost."""


@dataclass(frozen=True)
class Kind:
    """One kind of load, which a gateway of others takes part in if it can."""

    stream: bool
    size: Turn
    with_gateway: bool = False

    @property
    def name(self) -> str:
        return f"{'streamed' if self.stream else 'plain'}, {self.size.concurrency} at once"


TURN = Turn(192, concurrency=64, warm_up=64)
KINDS = (Kind(False, TURN, with_gateway=True), Kind(True, TURN))

Round = Mapping[str, Load]


def missing() -> str:
    """Return what it needs and is not there; nothing, where all is."""
    if gpus():
        # It takes a while to import, and need not be there where there is no GPU.
        from vllm.platforms import current_platform

        if current_platform.is_cuda():
            return ""
    return "it needs an NVIDIA GPU that nvidia-smi knows, and a vLLM that is built for it"


def measure(quick: bool) -> Part:
    """One server, and each kind of load on it for a while."""
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    sections: list[Section] = []
    say("gpu: the model, which is made the first time")
    model = small_model()
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        say("gpu: starting a server")
        env = {**environment(seed=0), "AGL_INSTRUMENT": "1", "AGL_STORE": str(Path(folder, "gpu.db"))}
        with RemoteOpenAIServer(*ARGUMENTS, model=model, small=(), env=env) as server:
            for kind in KINDS:
                say(f"gpu: {kind.name}")
                with gateway(server) if kind.with_gateway else nullcontext() as url, busy.running():
                    sections += tables(kind, asyncio.run(take_turns(server, kind, url, quick)))
    return Part("On a GPU", about(), sections, busy.share_of_others())


def about() -> str:
    return (
        f"vLLM {version('vllm')} as it is started by default, with CUDA graphs and in bfloat16, and a model in the "
        f"shape of Qwen2.5-0.5B whose weights are random. Chat completions of {TOKENS} tokens, recorded to SQLite. The "
        "second turn of vLLM shows what is read where nothing differs. CPU time is that of the API server's process, "
        "with the thread that writes. The client is one process: where it, or the API server, keeps a core busy, "
        "throughput and latency say what it takes, and not the engine."
    )


async def take_turns(server: RemoteOpenAIServer, kind: Kind, url: str | None, quick: bool) -> list[Round]:
    """The server alone, and behind the gateway where there is one."""
    request = {"model": server.model, **CHAT, "max_tokens": TOKENS, "stream": kind.stream}
    bodies = {name: {**request, **ASKS.get(name, {})} for name in POSITIONS}
    async with session(server.url) as straight, session(url or server.url) as through:
        clients = {
            name: Client(
                through if name == GATEWAY else straight, server.process.pid, PATH, bodies, POSITIONS, kind.size
            )
            for name in POSITIONS
            if url or name != GATEWAY
        }
        await is_up(through)
        for name, client in clients.items():
            await client.turn(name)
            await client.check(name, IDS, name != GATEWAY)
            await client.check(name, b'"logprobs":{', name == LOGPROBS_ASKED)
        return await rounds_of(clients, QUICK_SECONDS if quick else SECONDS, QUICK_MIN_ROUNDS if quick else MIN_ROUNDS)


def tables(kind: Kind, rounds: Sequence[Round]) -> list[Section]:
    names = [name for name in POSITIONS if name in rounds[0]]

    def compared(field: str, scale: float = 1) -> list[Row]:
        measured = {name: [scale * getattr(each[name], field) for each in rounds] for name in names}
        return [
            Row.of(name, values, measured[VLLM], TARGETS.get(field) if name == RECORDS else None)
            for name, values in measured.items()
        ]

    return [
        Section(f"throughput, {kind.name}", "tokens a second", "", compared("rate", TOKENS)),
        Section(f"CPU time of the API server, {kind.name}", "ms a request", "", compared("cpu")),
        Section(f"latency, p50, {kind.name}", "ms", "", compared("median")),
        Section(f"what kept a core busy, {kind.name}", "% of one core", "", busy_cores(rounds)),
    ]


def busy_cores(rounds: Sequence[Round]) -> list[Row]:
    """Processor time of the API server, beside its client: more than all of one core is what other threads took."""
    rows = []
    for name in (VLLM, RECORDS):
        loads = [each[name] for each in rounds]
        # Milliseconds a request, and requests a second: a tenth of a percent each.
        rows.append(Row(f"the API server: {name}", Summary.of([load.cpu * load.rate / 10 for load in loads])))
        rows.append(Row(f"the client: {name}", Summary.of([100 * load.client for load in loads])))
    return rows
