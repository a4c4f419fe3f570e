"""The cost of the patches for vLLM's event loop at each step of its engine, while many requests run.

vLLM's own output processor, in this process, is handed one token for each of the requests, as the engine does it. Three
of them take turns, in another order each time: vLLM's, another of vLLM's, which shows what is read where nothing
differs, and one whose requests came in while vLLM was instrumented, as it is at each of its steps.
"""

from __future__ import annotations

import gc
import random
import time
from contextvars import copy_context
from typing import Any

from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats

from agentlightning.instrumentation.vllm import _context, instrument_vllm, uninstrument_vllm
from agentlightning.instrumentation.vllm._context import RequestContext
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from tests.common.tiny_model import tiny_model

RUNNING = 256
LIVES, QUICK_LIVES = 20, 4
TURNS = 100
"""Steps of each, before all its requests make room for others."""
WARM_UP = 10

VLLM, AGAIN, OURS = "vLLM", "vLLM, again", "vLLM, instrumented"
MOST = Target(100)

ABOUT = (
    f"vLLM's output processor with {RUNNING} running requests, each of which gets a token at every step: an output. "
    "Their ids alone, without text."
)


def measure(quick: bool) -> Part:
    """Let all requests live for so many steps, and others again."""
    say("step")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    nanoseconds: dict[str, list[float]] = {VLLM: [], AGAIN: [], OURS: []}
    busy = BusyMeter()
    with busy.running():
        for _ in range(QUICK_LIVES if quick else LIVES):
            live(tokenizer, nanoseconds)
    rows = [Row.of(name, values, nanoseconds[VLLM]) for name, values in nanoseconds.items()]
    added = [Row.of_difference(f"{name}: more", nanoseconds[name], nanoseconds[VLLM]) for name in (AGAIN,)]
    added += [Row.of_difference(f"{OURS}: more", nanoseconds[OURS], nanoseconds[VLLM], MOST)]
    section = Section("a step of the engine, on the event loop", "ns an output", "", [*rows, *added])
    return Part("A step of the engine", ABOUT, [section], busy.share_of_others())


def live(tokenizer: Any, nanoseconds: dict[str, list[float]]) -> None:
    """Requests from their first token to their last, each step measured."""
    order = [VLLM, AGAIN, OURS]
    random.shuffle(order)
    processors = {name: Processor(tokenizer, instrumented=name == OURS) for name in order}
    # What is measured makes much garbage, whose collection would be measured where it happens to fall.
    gc.collect()
    gc.disable()
    for turn in range(TURNS):
        random.shuffle(order)
        for name in order:
            elapsed = processors[name].turn()
            if turn >= WARM_UP:
                nanoseconds[name].append(elapsed / RUNNING)
    gc.enable()


class Processor:
    """vLLM's output processor and its requests, each of which an HTTP request waits for."""

    def __init__(self, tokenizer: Any, instrumented: bool) -> None:
        self._instrumented = instrumented
        self._processor = OutputProcessor(tokenizer, log_stats=True)
        self._queues: dict[str, RequestOutputCollector] = {}
        self._turn_vllm()
        for number in range(RUNNING):
            copy_context().run(self._begin, str(number))

    def _begin(self, name: str) -> None:
        _context._current.set(RequestContext(collects=True))
        queue = self._queues[name] = RequestOutputCollector(RequestOutputKind.DELTA, name)
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            # Ids alone: text takes most of a step's time, and varies most, but it is no business of ours.
            sampling_params=SamplingParams(
                max_tokens=2 * TURNS + 1, output_kind=RequestOutputKind.DELTA, detokenize=False
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=name,
        )
        self._processor.add_request(request, "abc", queue=queue)

    def turn(self) -> int:
        """The nanoseconds of one step, of vLLM as it is now to be."""
        self._turn_vllm()
        self._step()  # What was patched, or is no longer, is looked up anew.
        return self._step()

    def _turn_vllm(self) -> None:
        # On or off, what was on is taken off: one turn is as much work as another.
        uninstrument_vllm()
        if self._instrumented:
            instrument_vllm()

    def _step(self) -> int:
        outputs = [EngineCoreOutput(name, [random.randrange(10, 500)]) for name in self._queues]
        started = time.thread_time_ns()
        self._processor.process_outputs(outputs, time.monotonic(), IterationStats())
        elapsed = time.thread_time_ns() - started
        for queue in self._queues.values():
            queue.get_nowait()
        return elapsed
