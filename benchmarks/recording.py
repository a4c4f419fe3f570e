"""The cost of recording for a server while it serves, beside vLLM and beside a gateway in front of it.

As in `benchmarks/serving.py`, all turns are taken by one server process, which is instrumented and records in its own,
and is vLLM's in the others. The gateway is a process of its own before that very server.

What the capture costs the event loop is measured without a server, by vLLM's own output processor in this process: a
few microseconds could not be seen beside what an answer costs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from vllm.v1.engine import EngineCoreOutput, FinishReason

from agentlightning.instrumentation.vllm import instrument_vllm, uninstrument_vllm
from agentlightning.instrumentation.vllm._context import RequestContextMiddleware
from agentlightning.instrumentation.vllm.capture.session import session as recording_session
from benchmarks.gateway import gateway, is_up
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.serving import (
    AGAIN,
    CHAT,
    CONCURRENCY,
    IDS,
    OURS,
    TOKENS,
    VLLM,
    Client,
    Load,
    Workload,
    environment,
    session,
    take_turns,
)
from tests.common.engine import Engine
from tests.common.vllm import RemoteOpenAIServer

STARTS, SECONDS = 2, 110
QUICK_STARTS, QUICK_SECONDS = 1, 60
MIN_ROUNDS = 15
"""Seconds for all starts together, however slow the machine is."""
PLAIN, STREAMED = (
    Workload(f"chat, {mode}", "/v1/chat/completions", {**CHAT, "stream": stream}, (), {"return_token_ids": True})
    for mode, stream in (("plain", False), ("streamed", True))
)
LABELS = {VLLM: "vLLM, asked for ids", AGAIN: "vLLM, asked for ids, again", OURS: "vLLM, recording to SQLite"}
GATEWAY = "the same behind a gateway that keeps ids"

PROMPTS = (1_000, 8_000, 32_000)
GENERATIONS, OUTPUT = 64, 128
# A step costs the same with us (`benchmarks/step.py`): many would hide what is looked for.
STEPS = 8
TURNS, QUICK_TURNS = 60, 15
MICROSECONDS = 20

ABOUT = (
    f"Chat completions of {TOKENS} tokens by a tiny model, {CONCURRENCY} at once. The second turn of vLLM shows what "
    "is read where nothing differs. CPU time is that of the API server's process, with the thread that writes; it is "
    "judged by its instructions, in counted."
)

Round = Mapping[str, Load]


def measure(quick: bool) -> Part:
    """A server for a while, and again; then the event loop's part alone."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: dict[str, list[Round]] = {PLAIN.name: [], STREAMED.name: [], GATEWAY: []}
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        for start in range(starts):
            say(f"recording: starting a server, {start + 1} of {starts}")
            env = {**environment(seed=start), "AGL_STORE": str(Path(folder, f"{start}.db"))}
            with RemoteOpenAIServer("--middleware=benchmarks.switch.Switch", env=env) as server:
                for workload in (PLAIN, STREAMED):
                    say(f"recording: {workload.name}")
                    with busy.running():
                        rounds[workload.name] += asyncio.run(take_turns(server, workload, seconds / 3))
                say(f"recording: {GATEWAY}")
                with gateway(server) as url, busy.running():
                    rounds[GATEWAY] += asyncio.run(take_turns_with(url, server, seconds / 3))
        say("recording: the event loop")
        with busy.running():
            event_loop = on_the_event_loop(Path(folder), QUICK_TURNS if quick else TURNS)
    sections = [of_cpu(workload, rounds[workload.name]) for workload in (PLAIN, STREAMED)]
    return Part("Recording", ABOUT, [*sections, of_rate(rounds[GATEWAY]), event_loop], busy.share_of_others())


def of_cpu(workload: Workload, rounds: Sequence[Round]) -> Section:
    measured = {name: [each[name].cpu for each in rounds] for name in LABELS}
    rows = [Row.of(LABELS[name], values, measured[VLLM]) for name, values in measured.items()]
    return Section(f"CPU time of the API server, {workload.name}", "ms a request", "", rows)


def of_rate(rounds: Sequence[Round]) -> Section:
    measured = {name: [each[name].rate for each in rounds] for name in (GATEWAY, VLLM, OURS)}
    target = Target(1.6, at_least=True)
    rows = [
        Row.of(label, measured[name], measured[GATEWAY], target if name == OURS else None)
        for name, label in ((GATEWAY, GATEWAY), (VLLM, LABELS[VLLM]), (OURS, LABELS[OURS]))
    ]
    about = "The gateway is benchmarks/proxy.py. A ratio is to it."
    return Section(f"throughput, {PLAIN.name}", "requests a second", about, rows)


async def take_turns_with(url: str, server: RemoteOpenAIServer, seconds: float) -> list[Round]:
    """Take turns like `take_turns`, with a gateway that takes turns with the server itself."""
    rounds: list[Round] = []
    order = [GATEWAY, VLLM, OURS]
    async with session(server.url) as straight, session(url) as through:
        await is_up(through)
        clients = {GATEWAY: Client.of(PLAIN, through, server)}
        clients[VLLM] = clients[OURS] = Client.of(PLAIN, straight, server)
        turns = {GATEWAY: VLLM, VLLM: VLLM, OURS: OURS}
        for name in order:
            await clients[name].turn(turns[name])
            if name != GATEWAY:
                await clients[name].check(turns[name], IDS)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline or len(rounds) < MIN_ROUNDS:
            random.shuffle(order)
            rounds.append({name: await clients[name].turn(turns[name]) for name in order})
    return rounds


def on_the_event_loop(folder: Path, turns: int) -> Section:
    """Measure what a generation costs the event loop's thread more than vLLM's own, from its arrival to the queue."""
    os.environ["AGL_STORE"] = str(folder / "event-loop.db")
    prompts = {length: [random.randrange(500) for _ in range(length)] for length in PROMPTS}
    more: dict[int, list[float]] = {length: [] for length in PROMPTS}
    ways = [(length, records) for length in PROMPTS for records in (False, True)]
    for turn in range(-1, turns):
        random.shuffle(ways)
        took = {(length, records): generate(prompts[length], records) for length, records in ways}
        # The first is not measured.
        if turn >= 0:
            for length in PROMPTS:
                more[length].append((took[length, True] - took[length, False]) / 1e3)
    uninstrument_vllm()
    recording_session.recorder.close()
    rows = [
        Row.of(f"a prompt of {length:,} ids", more[length], [MICROSECONDS] * turns, Target(1)) for length in PROMPTS
    ]
    rows.append(Row.of("the longest, to the shortest", more[PROMPTS[-1]], more[PROMPTS[0]], Target(1.25)))
    about = (
        f"CPU time of the thread, of {GENERATIONS} generations of {OUTPUT} ids in {STEPS} steps, a generation: what "
        f"vLLM's output processor and a request's way to it take more than vLLM's own. A ratio is to {MICROSECONDS} µs."
    )
    return Section("a generation, on the event loop", "µs", about, rows)


def generate(prompt: list[int], records: bool) -> float:
    """Nanoseconds a generation, of vLLM as it is or recording."""
    # On or off, what was on is taken off: one turn is as much work as another.
    uninstrument_vllm()
    if records:
        instrument_vllm()
        # Else the thread that writes would take the interpreter from this one, and what waits fill the queue.
        while recording_session.recorder.counters().queue_bytes:
            time.sleep(0.01)
    engine, names = Engine(), [f"generation {number}" for number in range(GENERATIONS)]
    scope = {"type": "http", "path": "/rollout/r/v1/completions", "raw_path": b"/rollout/r/v1/completions"}
    scopes: list[Any] = [{**scope, "headers": HEADERS, "state": {}} for _ in names]
    steps = [
        [
            EngineCoreOutput(
                f"{name}-0",
                [7] * (OUTPUT // STEPS),
                finish_reason=FinishReason.LENGTH if step == STEPS - 1 else None,
            )
            for name in names
        ]
        for step in range(STEPS)
    ]
    door = RequestContextMiddleware(add) if records else add
    nothing: Any = None
    gc.collect()
    gc.disable()
    started = time.thread_time_ns()
    for name, each in zip(names, scopes, strict=True):
        each["add"] = lambda name=name: engine.add(name, prompt, stream=True)
        _run(door(each, nothing, nothing))
    for outputs in steps:
        engine.steps(outputs)
    elapsed = time.thread_time_ns() - started
    gc.enable()
    return elapsed / GENERATIONS


HEADERS = [(f"x-header-{number}".encode(), b"some value") for number in range(12)]


def _run(answer: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing."""
    with suppress(StopIteration):
        answer.send(None)


async def add(scope: Any, receive: Any, send: Any) -> None:
    scope["add"]()
