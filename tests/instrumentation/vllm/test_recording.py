"""Ends of requests that no server produces at will, by vLLM's own `OutputProcessor`, in forked processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.pooling_params import PoolingParams
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request

from agentlightning import instrumentation
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm import _context, _isolation
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import engine_core, frontend
from agentlightning.instrumentation.vllm.capture.conversion import _filter_cached, params_as_json
from agentlightning.instrumentation.vllm.capture.frontend import find_pending
from agentlightning.instrumentation.vllm.capture.metrics import Metrics, Observer
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.endpoints import responses
from agentlightning.instrumentation.vllm.endpoints.answer import ALL_IDS, NO_IDS, id_fields
from agentlightning.patching import PatchSet
from agentlightning.recorder import Counters, Recorder
from tests.common.engine import Engine, kept

pytestmark = pytest.mark.forked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations.db"


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("AGL_STORE", str(path))
    instrumentation.instrument_vllm()
    engine = Engine()
    yield engine
    # Whatever the end was, nothing is held on to.
    running = find_pending(engine.processor)
    assert running is None or (running._requests, running._parents) == ({}, {})


def ends(generation: Generation) -> list[tuple[int, list[int], str | None]]:
    return [(choice.index, list(choice.token_ids or ()), choice.finish_reason) for choice in generation.choices]


def test_a_store_that_cannot_be_opened_at_first_has_what_is_generated_later(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(frontend, "start", lambda: 1 / 0)
        engine.add("first", [1, 2, 3])
    engine.says("first-0", [5], FinishReason.STOP)
    engine.add("second", [1, 2, 3])
    engine.says("second-0", [6], FinishReason.STOP)

    assert [generation.request_id for generation in kept(path)] == ["second"]
    assert sum(_isolation.failures.values()) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_one_finished_and_one_aborted_are_one_aborted_generation(
    engine: Engine, path: Path, stream: bool
) -> None:
    engine.add("two", [1, 2, 3], n=2, stream=stream)
    engine.says("0_two-0", [5])
    engine.says("1_two-0", [6, 7], FinishReason.LENGTH)
    engine.processor.abort_requests(["two-0"], internal=True)

    [generation] = kept(path)
    assert ends(generation) == [(0, [5], "abort"), (1, [6, 7], "length")]
    assert (generation.status, generation.request_id) == ("aborted", "two")
    assert list(generation.prompt_token_ids or ()) == [1, 2, 3]


def test_choices_that_end_one_by_one_are_one_generation(engine: Engine, path: Path) -> None:
    engine.add("three", [1], n=3)
    for index in (2, 0, 1):
        engine.says(f"{index}_three-0", [index], FinishReason.STOP)

    [generation] = kept(path)
    assert ends(generation) == [(0, [0], "stop"), (1, [1], "stop"), (2, [2], "stop")]
    assert generation.status == "finished"


def test_a_request_that_the_engine_fails_is_recorded_as_failed(engine: Engine, path: Path) -> None:
    engine.add("failing", [1])
    engine.says("failing-0", [2, 3])
    engine.says("failing-0", [], FinishReason.ERROR)

    [generation] = kept(path)
    assert (generation.status, ends(generation)) == ("error", [(0, [2, 3], "error")])


def test_a_request_aborted_before_its_first_id_is_recorded(engine: Engine, path: Path) -> None:
    engine.add("early", [1])
    engine.processor.abort_requests(["early"], internal=False)
    # What the engine had on its way by then.
    engine.says("early-0", [2], FinishReason.LENGTH)

    [generation] = kept(path)
    assert (generation.status, ends(generation)) == ("aborted", [(0, [], "abort")])


def test_unfinished_requests_of_a_dead_engine_are_recorded_as_failed(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    engine.add("two", [1], n=2)
    engine.says("1_two-0", [6], FinishReason.LENGTH)
    engine.processor.propagate_error(RuntimeError("dead"))

    assert {each.request_id: (each.status, ends(each)) for each in kept(path)} == {
        "one": ("error", [(0, [], "error")]),
        "two": ("error", [(0, [], "error"), (1, [6], "length")]),
    }


def test_a_request_with_more_input_in_between_leaves_nothing(engine: Engine, path: Path) -> None:
    engine.add("realtime", [1], stream=True, resumable=True)
    engine.says("realtime-0", [2], FinishReason.LENGTH)
    engine.add("realtime", [3], stream=True, resumable=True)
    engine.says("realtime-0", [4], FinishReason.LENGTH)
    engine.add("realtime", [0], stream=True)

    assert engine.processor.request_states == {}
    assert not path.exists()


class Scheduler:
    """A stand-in for vLLM's, which needs a model."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        self.requests.setdefault(request.request_id, request)


def test_an_engine_core_records_neither_ends_of_input_nor_refusals(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_STORE", str(path))
    add, scheduler = engine_core.wrap_add_request(Scheduler.add_request), Scheduler()
    add(scheduler, Request("realtime", [0], SamplingParams(), None, resumable=True))
    add(scheduler, Request("realtime", [0], SamplingParams(), None))
    add(scheduler, Request("refused", [0], SamplingParams(), None, abort_immediately=True))
    assert scheduler not in engine_core._unmarked

    add(scheduler, Request("another", [1, 2], SamplingParams(), None))
    assert [*engine_core._unmarked[scheduler]._tracked] == ["another"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_engine_core_that_is_ended_twice_writes_what_was_unfinished(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("AGL_STORE", str(path))
    add, scheduler = engine_core.wrap_add_request(Scheduler.add_request), Scheduler()
    add(scheduler, Request("one", [1, 2], SamplingParams(), None))
    close = Recorder.close

    def close_while_ended_again(recorder: Recorder) -> None:
        os.kill(os.getpid(), number)
        close(recorder)

    signal.signal(number, signal.SIG_DFL)
    with monkeypatch.context() as during:
        during.setattr(Recorder, "close", close_while_ended_again)
        engine_core.wrap_end("abort")(lambda core: None)(None)

    assert signal.getsignal(number) is signal.SIG_DFL
    [generation] = kept(path)
    assert (generation.status, ends(generation)) == ("aborted", [(0, [], "abort")])


def test_a_pooling_request_leaves_nothing(engine: Engine, path: Path) -> None:
    engine.add("pooled", [1], pooling_params=PoolingParams())
    engine.processor.abort_requests(["pooled"], internal=False)

    assert not path.exists()


def test_an_offline_generation_leaves_nothing(engine: Engine, path: Path) -> None:
    engine.add("offline", [1], queue=False)
    engine.says("offline-0", [2], FinishReason.LENGTH)

    assert engine.processor.request_states == {}
    assert not path.exists()


def test_a_queued_generation_keeps_no_image_alive(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Callable[[], Generation]] = []
    monkeypatch.setattr(session, "record", lambda build, *sizes: waiting.append(build))
    image = Image()
    seen = weakref.ref(image)
    engine.add("seeing", [1, 2, 3], mm_features=[image])
    del image
    gc.collect()

    # vLLM has already sent it to its engine.
    assert seen() is None
    engine.says("seeing-0", [5], FinishReason.STOP)
    [build] = waiting
    assert list(build().prompt_token_ids or ()) == [1, 2, 3]


class Image:
    """Stands for what vLLM has made of one."""


def test_prompt_embeddings_count_for_the_queue(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(session, "record", lambda build, ids, more, whose: sizes.append(more))
    # Few: threads of torch's own do not outlive a fork, and who works on many waits for them.
    embeds = torch.zeros(10, 64)
    engine.add("embedded", None, prompt_embeds=embeds)
    engine.add("plain", [1])
    engine.says("embedded-0", [5], FinishReason.STOP)
    engine.says("plain-0", [5], FinishReason.STOP)

    assert sizes == [embeds.nbytes, 0]


def test_a_prompt_with_embeddings_in_it_has_no_ids(engine: Engine, path: Path) -> None:
    mixed = {"prompt_embeds": torch.zeros(3, 64), "prompt_is_token_ids": [True, False, True]}
    engine.add("mixed", [1, 0, 3], **mixed)
    engine.says("mixed-0", [5], FinishReason.STOP)

    [generation] = kept(path)
    assert (generation.prompt_token_ids, ends(generation)) == (None, [(0, [5], "stop")])


def test_a_vllm_without_the_expected_attributes_answers_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_STORE", str(path))
    add = frontend.wrap_add_request(lambda processor, request, *others: "added")
    process = frontend.wrap_process_outputs(lambda processor, outputs: outputs)

    assert add(object(), object(), None) == "added"
    assert process(object(), [1]) == [1]
    assert _isolation.failures == {"looking for a request: AttributeError": 1}


class Serving:
    """A stand-in for vLLM's, which needs a model."""

    async def create_responses(self, request: Any) -> RequestContext | None:
        return _context.current()

    async def responses_full_generator(self, request: Any) -> None: ...


def test_a_call_without_a_route_gets_the_endpoint_of_its_method(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_STORE", str(path))
    serving = ModuleType("serving")
    vars(serving)["OpenAIServingResponses"] = Serving
    PatchSet("responses", ("serving",), responses.SERVING_PATCHES).apply(serving)
    request = SimpleNamespace(model="tiny", model_fields_set=set())
    context = asyncio.run(Serving().create_responses(request))

    assert context is not None
    assert (context.endpoint, context.model) == ("/v1/responses", "tiny")


def test_a_forked_process_counts_from_zero() -> None:
    observer = Observer(Metrics())
    observer(Counters(generations=3))
    child = os.fork()
    if not child:
        with contextlib.suppress(ValueError):
            observer(Counters(generations=1))
            os._exit(0)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_program_instrumented_again_with_another_store_records_there(
    engine: Engine, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add("first", [1])
    engine.says("first-0", [5], FinishReason.LENGTH)
    first_recorder = session.recorder
    instrumentation.uninstrument_vllm()
    another = tmp_path / "another.db"
    monkeypatch.setenv("AGL_STORE", str(another))
    instrumentation.instrument_vllm()
    engine.add("second", [1])
    engine.says("second-0", [6], FinishReason.LENGTH)

    [second] = kept(another)
    assert second.request_id == "second"
    report = session.report()
    assert report is not None
    assert (report["store"], report["generations"]) == (str(another), 1)
    [first] = kept(path, first_recorder)
    assert first.request_id == "first"


def test_settings_changed_while_instrumented_count_only_when_instrumented_again(
    engine: Engine, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is read once, and never for a request or a generation."""
    engine.add("first", [1])
    monkeypatch.setenv("AGL_STORE", str(tmp_path / "another.db"))
    monkeypatch.setenv("AGL_RETURN_TOKEN_IDS", "none")
    engine.says("first-0", [5], FinishReason.LENGTH)
    assert id_fields(None) == ALL_IDS

    [first] = kept(path)
    assert first.request_id == "first"
    instrumentation.uninstrument_vllm()
    instrumentation.instrument_vllm()
    assert id_fields(None) == NO_IDS


def test_requests_unfinished_at_uninstrumenting_are_not_recorded_but_logged(
    engine: Engine, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine.add("under-way", [1])
    instrumentation.uninstrument_vllm()
    engine.says("under-way-0", [5], FinishReason.LENGTH)
    instrumentation.instrument_vllm()

    assert "1 unfinished requests are not recorded" in caplog.text
    assert session.recorder.counters().queue_bytes or session.recorder.counters().lost["not built"]
    assert find_pending(engine.processor) is None


def test_long_parameters_are_not_cached() -> None:
    long = SamplingParams(allowed_token_ids=list(range(5_000)))
    before = _filter_cached.cache_info().currsize

    assert json.loads(params_as_json(long, keeps_text=True))["allowed_token_ids"] == list(range(5_000))
    assert _filter_cached.cache_info().currsize == before


def test_parameters_recorded_without_text_are_numbers() -> None:
    params = SamplingParams(
        max_tokens=7,
        temperature=0.5,
        stop=["secret"],
        stop_token_ids=[5],
        logit_bias={3: 1.5},
        extra_args={"secret": 1},
    )

    kept = json.loads(params_as_json(params, keeps_text=False))
    numbers = {"max_tokens": 7, "temperature": 0.5, "stop_token_ids": [5], "logit_bias": {"3": 1.5}}
    assert numbers.items() <= kept.items()
    assert "secret" not in str(kept)
    assert "secret" in params_as_json(params, keeps_text=True)
