"""A server whose work for a request depends on no timing: `--scheduler-cls` and `--middleware` of `vllm serve`.

Under valgrind an API server is many times slower than its engine core: tokens would reach it in lumps, and what shares
a step would be chance. So the scheduler begins a step when the API server has taken the tokens of the last; and of
requests that are sent at once, none goes on before all are there. The recorder's clock stands still as well: what a
turn has generated is written together at its end, with one report to the store.

The two processes share a few counters in a file.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import mmap
import os
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from threading import Event
from typing import Any

import uvicorn
from vllm.v1.core.sched.scheduler import Scheduler

from agentlightning.instrumentation.vllm._context import App
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.recorder import Recorder, _recorder
from benchmarks.switch import Switch, answer

__all__ = [
    "END",
    "MODES",
    "OFF",
    "PACE",
    "STORES",
    "TURN",
    "HeldRecordings",
    "Pace",
    "PacedScheduler",
    "PacedSwitch",
    "set_mode",
]

PACE = "BENCH_PACE"
"""The variable with the path of the counters' file."""
STORES = {"file": "BENCH_FILE", "store": "BENCH_STORE"}
"""Variables with the places of stores, by their names in `MODES`."""
TURN, END = "/turn/", "/end"
"""Routes: the first, followed by one of `MODES` and `?N`, begins a turn of N requests at once; the second writes what
is held back."""
OFF = "off"
MODES: Mapping[str, Mapping[str, str]] = {
    OFF: {},
    "instrumented": {},
    "file": {"AGL_STORE": "file"},
    "store": {"AGL_STORE": "store"},
    "logprobs": {"AGL_STORE": "file", "AGL_LOGPROBS": "on"},
    "continuation": {"AGL_STORE": "file", "AGL_CONTINUE": "on"},
    "sampling": {"AGL_STORE": "file", "AGL_SAMPLING": "temperature=0.7,top_p=0.9"},
}
"""The variables of a server in this mode, with the name of a store in the place of its address."""
OURS = sorted({name for variables in MODES.values() for name in variables})
NEVER = 1e6
# Of uvicorn, which looks at the time ten times a second.
TICK_SECONDS = 10.0
_COUNTERS = struct.Struct("<4q")
AT_ONCE, ARRIVED, GIVEN, TAKEN = range(4)


class Pace:
    """The counters: requests at once, requests sent to the engine core, tokens given, tokens taken."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _COUNTERS.size)

    @staticmethod
    def make(path: Path) -> None:
        path.write_bytes(bytes(_COUNTERS.size))

    def __getitem__(self, which: int) -> int:
        return struct.unpack_from("<q", self._memory, 8 * which)[0]

    def __setitem__(self, which: int, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * which, value)


class PacedScheduler(Scheduler):
    """vLLM's own, which waits for the API server before each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pace = Pace(os.environ[PACE])

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        pace = self._pace
        while pace[AT_ONCE] and (pace[TAKEN] < pace[GIVEN] or pace[ARRIVED] % pace[AT_ONCE]):
            time.sleep(0.001)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        batches = super().update_from_output(*args, **kwargs)
        self._pace[GIVEN] += any(batch.outputs for batch in batches.values())
        return batches


class HeldRecordings:
    """The generations of a turn, which the writing thread gets at its end: one batch, and one report to the store."""

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] = []
        self._written = Event()
        _recorder.SECONDS_BETWEEN_REPORTS = NEVER
        # Whatever is queued together is one batch, however slowly it is queued.
        _recorder.GATHERING_SECONDS = 2.0
        record, report = Recorder.record, Recorder._report

        def hold(recorder: Recorder, *args: Any) -> None:
            self._held.append(functools.partial(record, recorder, *args))

        def report_and_tell(*args: Any, **kwargs: Any) -> None:
            report(*args, **kwargs)
            if not session.recorder.counters().queue_bytes:
                self._written.set()

        Recorder.record, Recorder._report = hold, report_and_tell  # type: ignore[method-assign]

    def write(self) -> None:
        """Write all, and wait until the store has been told."""
        held, self._held = self._held, []
        if held:
            self._written.clear()
            for record in held:
                record()
            self._written.wait()


def set_mode(mode: str) -> None:
    """Set this process's variables as they are in this mode."""
    for name in OURS:
        os.environ.pop(name, None)
    os.environ.update(MODES[mode])
    if place := os.environ.get("AGL_STORE"):
        os.environ["AGL_STORE"] = os.environ[STORES[place]]


class PacedSwitch(Switch):
    """The switch, and what keeps the scheduler's pace."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._pace = Pace(os.environ[PACE])
        self._recordings = HeldRecordings()
        self._is_watching = False
        tick = uvicorn.Server.on_tick

        async def tick_seldom(server: uvicorn.Server, counter: int) -> bool:
            await asyncio.sleep(TICK_SECONDS)
            return await tick(server, counter)

        uvicorn.Server.on_tick = tick_seldom  # type: ignore[method-assign]

    def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"].startswith(TURN):
            return self._begin(scope, send)
        if scope["type"] == "http" and scope["path"] == END:
            return self._end(send)
        return super().__call__(scope, receive, send)

    async def _begin(self, scope: MutableMapping[str, Any], send: Any) -> None:
        if not self._is_watching:
            self._watch(scope["app"].state.engine_client)
            self._is_watching = True
        mode = scope["path"].removeprefix(TURN)
        set_mode(mode)
        self._pace[AT_ONCE] = int(scope["query_string"])
        self._pace[ARRIVED], self._pace[TAKEN] = 0, self._pace[GIVEN]
        self.put(scope["app"], on=mode != OFF)
        gc.collect()
        await answer(send)

    async def _end(self, send: Any) -> None:
        await asyncio.to_thread(self._recordings.write)
        await answer(send)

    def _watch(self, client: Any) -> None:
        """Count what is sent to the engine core, and what comes from it once all of it has been taken."""
        core, states, pace = client.engine_core, client.output_processor.request_states, self._pace
        add, get, untaken = core.add_request_async, core.get_output_async, 0

        async def add_and_count(*args: Any) -> None:
            await add(*args)
            pace[ARRIVED] += 1

        async def take_and_get() -> Any:
            nonlocal untaken
            while any(state.queue.output is not None for state in states.values()):
                await asyncio.sleep(0)
            pace[TAKEN] += untaken
            outputs = await get()
            untaken = bool(outputs.outputs)
            return outputs

        core.add_request_async, core.get_output_async = add_and_count, take_and_get
