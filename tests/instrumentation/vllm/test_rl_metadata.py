"""Logprobs, weight versions and routed experts, as engines give them that no test machine has; in forked processes.

vLLM's own `OutputProcessor` and `Request` are given what such an engine would say.
"""

from __future__ import annotations

import gc
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, SamplingMaskLists
from vllm.v1.request import Request

from agentlightning import instrumentation
from agentlightning.generation import RoutedExperts
from agentlightning.instrumentation.vllm import _isolation, _releases
from agentlightning.instrumentation.vllm.capture import alternatives, engine_core, logprobs
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.capture.unmarked import UnmarkedRequests
from tests.common.engine import Engine, kept

pytestmark = pytest.mark.forked

LENGTH, ABORT = FinishReason.LENGTH, FinishReason.ABORT


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "generations.db"
    monkeypatch.setenv("AGL_STORE", str(path))
    monkeypatch.setenv("AGL_LOGPROBS", "on")
    instrumentation.instrument_vllm()
    return path


@pytest.fixture
def engine(path: Path) -> Engine:
    return Engine()


def arrays(*logprobs: float) -> LogprobsLists:
    """Return the engine's arrays for that many ids, in a batch where another request asked for one logprob more."""
    of_each = numpy.array([[logprob, -9.0] for logprob in logprobs], dtype=numpy.float32)
    return LogprobsLists(numpy.ones_like(of_each, dtype=numpy.int32), of_each, numpy.ones(len(logprobs)))


def experts(*of_ids: int) -> Any:
    """Return the experts of two layers for each of these ids, derived from its number."""
    return numpy.array([[[each, each + 1], [each + 2, each + 3]] for each in of_ids], dtype=numpy.uint8)


def masks(*of_ids: Sequence[int]) -> SamplingMaskLists:
    """Return what each of these ids was chosen from, as an engine sends it: for one id without offsets."""
    ids = numpy.array([each for of_id in of_ids for each in of_id], dtype=numpy.int32)
    if len(of_ids) == 1:
        return SamplingMaskLists(ids)
    return SamplingMaskLists(ids, numpy.cumsum([0, *map(len, of_ids)]))


def output(name: str, ids: Sequence[int], end: FinishReason | None = None, **more: Any) -> EngineCoreOutput:
    return EngineCoreOutput(name, [*ids], finish_reason=end, **more)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_steps_with_several_ids_give_one_logprob_per_id(engine: Engine, path: Path, stream: bool) -> None:
    engine.add("one", [1], stream=stream)
    engine.steps([output("one-0", [5], new_logprobs=arrays(-0.5))])
    engine.steps([output("one-0", [6, 7, 8], LENGTH, new_logprobs=arrays(-0.25, -1, -2))])

    [choice] = kept(path)[0].choices
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == [-0.5, -0.25, -1, -2]


def test_more_logprobs_than_ids_are_cut(engine: Engine, path: Path) -> None:
    """Up to 0.31 an engine with speculative decoding also gives those after a stop string."""
    engine.add("one", [1])
    engine.steps([output("one-0", [5, 6], LENGTH, new_logprobs=arrays(-0.5, -1, -2))])

    [choice] = kept(path)[0].choices
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == [-0.5, -1]


def test_missing_logprobs_are_recorded_as_none(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    engine.steps([output("one-0", [5], new_logprobs=arrays(-0.5))])
    engine.steps([output("one-0", [6], LENGTH)])

    [generation] = kept(path)
    assert (generation.choices[0].logprobs, generation.logprobs_mode) == (None, None)


def test_logprobs_of_an_unknown_shape_do_not_stop_the_engine(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    of_each = numpy.array([-0.5], dtype=numpy.float32)
    engine.steps([output("one-0", [5], LENGTH, new_logprobs=LogprobsLists(of_each, of_each, of_each))])

    [generation] = kept(path)
    assert generation.choices[0].logprobs is None
    assert _isolation.failures == {"taking logprobs: IndexError": 1}


def test_recorded_logprobs_keep_no_object_of_vllm_alive(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    gc.disable()
    found = arrays(-0.5)
    # A part of the message that all requests of the step came in.
    seen = weakref.ref(found.logprobs)
    engine.steps([output("one-0", [5], new_logprobs=found)])
    del found
    assert seen() is None

    processor = weakref.ref(engine.processor.request_states["one-0"].logprobs_processor)
    engine.steps([output("one-0", [6], LENGTH, new_logprobs=arrays(-1))])
    assert len(kept(path)) == 1
    assert processor() is None


def test_each_of_n_choices_has_its_logprobs_and_vllm_has_none(engine: Engine, path: Path) -> None:
    engine.add("two", [1, 2, 3], n=2)
    states = list(engine.processor.request_states.values())
    engine.steps(
        [
            output("0_two-0", [5], LENGTH, new_logprobs=arrays(-0.5)),
            output("1_two-0", [6], LENGTH, new_logprobs=arrays(-1)),
        ]
    )

    found = [choice.logprobs for choice in kept(path)[0].choices]
    assert [each.tolist() for each in found if each is not None] == [[-0.5], [-1]]
    assert [state.logprobs_processor and state.logprobs_processor.logprobs for state in states] == [None, None]


def test_an_aborted_request_keeps_its_logprobs_weights_and_experts(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    engine.steps([output("one-0", [5], new_logprobs=arrays(-0.5), routed_experts=experts(3, 4))], weights="v1")
    engine.steps([output("one-0", [6], new_logprobs=arrays(-1), routed_experts=experts(5))], weights="v2")
    engine.processor.abort_requests(["one-0"], internal=True)

    [choice] = kept(path)[0].choices
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == [-0.5, -1]
    assert choice.weight_versions == [("v1", 0, 1), ("v2", 1, 2)]
    assert choice.routed_experts is not None
    assert choice.routed_experts.tolist() == experts(3, 4, 5).tolist()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_finished_request_has_its_experts_and_weights(engine: Engine, path: Path, stream: bool) -> None:
    engine.add("one", [1], stream=stream)
    engine.steps([output("one-0", [5, 6], routed_experts=experts(1, 2, 3))], weights="v1")
    engine.steps([output("one-0", [7], LENGTH, routed_experts=experts(250))], weights="v2")

    [choice] = kept(path)[0].choices
    assert choice.weight_versions == [("v1", 0, 2), ("v2", 2, 3)]
    assert choice.routed_experts is not None
    assert choice.routed_experts.shape == (4, 2, 2)
    assert choice.routed_experts.tolist() == experts(1, 2, 3, 250).tolist()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_mask_is_kept_for_each_id_and_the_client_still_gets_it(engine: Engine, path: Path, stream: bool) -> None:
    engine.add("one", [1], stream=stream)
    state = engine.processor.request_states["one-0"]
    assert state.queue is not None
    carried: list[list[int]] = []
    for ids, mask, end in (([5], [[5, 9]], None), ([6, 7], [[6], [7, 8, 9]], None), ([8], [[8]], LENGTH)):
        engine.steps([output("one-0", ids, end, new_sampling_mask=masks(*mask))])
        if stream or end:
            answer: Any = state.queue.get_nowait()
            carried += answer.outputs[0].sampling_mask.token_ids

    [choice] = kept(path)[0].choices
    assert choice.sampling_mask is not None
    assert choice.sampling_mask.tolist() == carried == [[5, 9], [6], [7, 8, 9], [8]]


def test_masks_of_each_choice_and_of_aborted_requests_are_kept(engine: Engine, path: Path) -> None:
    engine.add("two", [1, 2, 3], n=2, stream=True)
    engine.steps(
        [
            output("0_two-0", [5], new_sampling_mask=masks([5])),
            output("1_two-0", [6], LENGTH, new_sampling_mask=masks([6, 7])),
        ]
    )
    engine.processor.abort_requests(["0_two-0"], internal=True)
    engine.add("none", [1])
    engine.steps([output("none-0", [5], LENGTH)])

    two, none = kept(path)
    found = [choice.sampling_mask for choice in two.choices]
    assert [each.tolist() for each in found if each is not None] == [[[5]], [[6, 7]]]
    assert none.choices[0].sampling_mask is None


def test_recorded_masks_keep_no_message_alive_and_are_counted(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add("one", [1])
    counted: list[int] = []
    record = session.record
    monkeypatch.setattr(session, "record", lambda *args: [counted.append(args[2]), record(*args)])
    gc.disable()
    whole = numpy.arange(5000, dtype=numpy.int32)
    # As an engine gives it: a view of what it has for all requests of a step.
    found = SamplingMaskLists(whole[5:9])
    seen = weakref.ref(whole)
    engine.steps([output("one-0", [5], LENGTH, new_sampling_mask=found)])
    del whole, found
    assert seen() is None
    # Four ids, and how many they are.
    assert counted == [20]

    [choice] = kept(path)[0].choices
    assert choice.sampling_mask is not None
    assert choice.sampling_mask.tolist() == [[5, 6, 7, 8]]


def test_masks_and_alternatives_of_more_ids_than_are_kept_are_cut(engine: Engine, path: Path) -> None:
    engine.add("one", [1])
    engine.steps([output("one-0", [5], LENGTH, new_sampling_mask=masks([5], [6, 7]))])

    [choice] = kept(path)[0].choices
    assert choice.sampling_mask is not None
    assert choice.sampling_mask.tolist() == [[5]]


def top(*of_ids: tuple[int, float, int, float]) -> LogprobsLists:
    """Return for each id its logprob, and that of the likeliest one."""
    ids = numpy.array([[first, second] for first, _, second, _ in of_ids], dtype=numpy.int32)
    logprobs = numpy.array([[first, second] for _, first, _, second in of_ids], dtype=numpy.float32)
    return LogprobsLists(ids, logprobs, numpy.ones(len(of_ids), dtype=numpy.int32))


def tensors(found: LogprobsLists) -> LogprobsTensors:
    """Return the same for a prompt."""
    ids, logprobs, ranks = (torch.from_numpy(each) for each in found[:3])
    return LogprobsTensors(ids, logprobs, ranks)


@pytest.mark.parametrize("flat", [False, True], ids=["objects", "flat"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_alternatives_are_kept_where_the_client_asked_for_them(
    engine: Engine, path: Path, stream: bool, flat: bool
) -> None:
    engine.add("asks", [1, 2, 3], stream=stream, logprobs=1, prompt_logprobs=1, flat_logprobs=flat)
    engine.add("only its own", [1, 2, 3], stream=stream, logprobs=0)
    of_prompt = tensors(top((2, -1, 2, -1), (3, -2, 9, -0.5)))
    for ids, found, end in (([5], top((5, -1, 4, -0.5)), None), ([6], top((6, -0.25, 6, -0.25)), LENGTH)):
        prompt = of_prompt if end is None else None
        both = (
            output("asks-0", ids, end, new_logprobs=found, new_prompt_logprobs_tensors=prompt),
            output("only its own-0", ids, end, new_logprobs=found),
        )
        engine.steps([*both])

    asks, own = kept(path)
    [choice] = asks.choices
    assert choice.top_logprobs is not None
    assert choice.top_logprobs.tolist() == [
        [{"id": 5, "logprob": -1.0}, {"id": 4, "logprob": -0.5}],
        [{"id": 6, "logprob": -0.25}],
    ]
    assert asks.prompt_logprobs is not None
    assert asks.prompt_logprobs.tolist() == [
        [],
        [{"id": 2, "logprob": -1.0}],
        [{"id": 3, "logprob": -2.0}, {"id": 9, "logprob": -0.5}],
    ]
    assert (own.choices[0].top_logprobs, own.prompt_logprobs) == (None, None)


class Scheduler:
    """A stand-in for vLLM's scheduler, which needs a model; only used as a key."""


def unmarked(name: str, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=9, **params)
    return Request(name, [1, 2], sampling, None, arrival_time=1.0)


def step(request: Request, ids: Sequence[int], end: FinishReason | None = None, **more: Any) -> EngineCoreOutput:
    request.append_output_token_ids([*ids])
    return output(request.request_id, ids, end, **more)


def test_an_engine_core_records_logprobs_weights_and_experts(path: Path) -> None:
    requests = UnmarkedRequests(Scheduler())
    requests.note_weights("default")
    asks, asked = unmarked("cmpl-a-00000000"), unmarked("cmpl-b-00000000", logprobs=1)
    for request in (asks, asked):
        requests.track(request)
    assert asks.sampling_params is not None
    assert asks.sampling_params.logprobs == 0
    sent = [step(each, [5], new_logprobs=arrays(-0.5), routed_experts=experts(3, 4)) for each in (asks, asked)]
    requests.add_step({0: EngineCoreOutputs(outputs=sent)})
    requests.note_weights("v2")
    requests.add_step({0: EngineCoreOutputs(outputs=[step(asked, [6], LENGTH, new_logprobs=arrays(-1))])})
    requests.end_all("error")

    # To a frontend that has asked for them they go on.
    assert [each.new_logprobs is None for each in sent] == [True, False]
    assert not requests
    by_name = {each.request_id: each for each in kept(path)}
    assert by_name.keys() == {"cmpl-a", "cmpl-b"}
    [failed], [finished] = by_name["cmpl-a"].choices, by_name["cmpl-b"].choices
    assert failed.logprobs is not None
    assert finished.logprobs is not None
    assert (failed.logprobs.tolist(), finished.logprobs.tolist()) == ([-0.5], [-0.5, -1])
    assert finished.weight_versions == [("default", 0, 1), ("v2", 1, 2)]
    experts_of_both = RoutedExperts((2, 2, 2), array("h", [3, 4, 5, 6, 4, 5, 6, 7]))
    assert finished.routed_experts == failed.routed_experts == experts_of_both
    assert (by_name["cmpl-a"].status, by_name["cmpl-b"].status) == ("error", "finished")


def test_an_engine_core_copies_what_it_keeps_of_a_step(path: Path) -> None:
    requests = UnmarkedRequests(Scheduler())
    request = unmarked("cmpl-a-00000000", logprobs=1)
    requests.track(request)
    gc.disable()
    ids, logprobs_of_ids = numpy.arange(5000, dtype=numpy.int32), top((5, -1, 4, -0.5))
    mask = SamplingMaskLists(ids[5:9])
    seen = [weakref.ref(each) for each in (ids, *logprobs_of_ids[:2])]
    more = {"new_logprobs": logprobs_of_ids, "new_sampling_mask": mask}
    requests.add_step({0: EngineCoreOutputs(outputs=[step(request, [5], **more)])})
    del ids, mask, more, logprobs_of_ids
    assert [each() for each in seen] == [None] * 3
    requests.add_step({0: EngineCoreOutputs(outputs=[step(request, [6], LENGTH, new_logprobs=top((6, -1, 6, -1)))])})

    [choice] = kept(path)[0].choices
    assert choice.top_logprobs is not None
    assert [[each["id"] for each in of_id] for of_id in choice.top_logprobs.tolist()] == [[5, 4], [6]]
    # The second id has no mask.
    assert choice.sampling_mask is None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"logprobs_mode": "processed_logprobs"}, "this release has no --return-sampling-mask"),
        ({"logprobs_mode": "processed_logprobs", "return_sampling_mask": False}, "--return-sampling-mask is off"),
        ({"logprobs_mode": "processed_logprobs", "return_sampling_mask": True}, None),
        ({"logprobs_mode": "raw_logprobs"}, None),
    ],
)
def test_an_engine_core_behind_the_rust_frontend_says_that_masks_are_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], told: str | None
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(alternatives.logger, "warning", lambda words, *args: logged.append(words % args))
    monkeypatch.setattr(_releases, "uses_rust_frontend", lambda: True)
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(served_model_name="tiny", **config))
    )

    engine_core.wrap_init(lambda self: None)(core)

    assert [line.partition("with them: ")[2] for line in logged] == ([] if told is None else [told])


def test_an_unreadable_output_leaves_the_others_of_its_step_intact(path: Path) -> None:
    requests = UnmarkedRequests(Scheduler())
    odd, good = unmarked("cmpl-odd-00000000", logprobs=1), unmarked("cmpl-good-00000000", logprobs=1)
    for request in (odd, good):
        requests.track(request)
    of_another_shape = LogprobsLists(numpy.ones(1), numpy.float32(-0.5), numpy.ones(1))  # type: ignore[arg-type]
    sent = [
        step(odd, [5], LENGTH, new_logprobs=of_another_shape),
        step(good, [6], LENGTH, new_logprobs=arrays(-1)),
    ]
    requests.add_step({0: EngineCoreOutputs(outputs=sent)})

    assert not requests
    by_name = {each.request_id: each.choices[0] for each in kept(path)}
    assert by_name["cmpl-odd"].token_ids == array("i", [5])
    assert by_name["cmpl-odd"].logprobs is None
    assert by_name["cmpl-good"].logprobs == array("f", [-1])
    assert _isolation.failures.total() == 1


def test_logprobs_of_traced_requests_are_sent_unpacked() -> None:
    traced, untraced = (
        output("one", [5, 6], new_logprobs=arrays(-0.5, -1), trace_headers=headers) for headers in ({"a": "b"}, None)
    )
    taken: list[Any] = []
    kept = untraced
    traced, untraced = logprobs.pack(traced), logprobs.pack(untraced)
    assert (traced.new_logprobs is None, untraced.new_logprobs is None) == (False, True)
    # A scheduler of the user's may have kept it.
    assert (kept.new_logprobs is None, kept.trace_headers) == (False, None)
    for each in (traced, untraced):
        logprobs.take(each, taken)

    assert (traced.trace_headers, untraced.trace_headers) == ({"a": "b"}, None)
    assert logprobs.join(taken, 4) == array("f", [-0.5, -1, -0.5, -1])


def test_an_engine_core_records_masks_and_alternatives(path: Path) -> None:
    requests = UnmarkedRequests(Scheduler())
    request = unmarked("cmpl-a-00000000", logprobs=1, prompt_logprobs=0)
    requests.track(request)
    of_prompt = tensors(top((2, -1, 7, -0.5)))
    first = step(
        request,
        [5],
        new_logprobs=top((5, -1, 4, -0.5)),
        new_prompt_logprobs_tensors=of_prompt,
        new_sampling_mask=masks([5]),
    )
    last = step(request, [6], LENGTH, new_logprobs=top((6, -1, 6, -1)), new_sampling_mask=masks([6, 4]))
    for each in (first, last):
        requests.add_step({0: EngineCoreOutputs(outputs=[each])})

    [generation] = kept(path)
    [choice] = generation.choices
    assert choice.sampling_mask is not None
    assert choice.sampling_mask.tolist() == [[5], [6, 4]]
    assert choice.top_logprobs is not None
    assert [[each["id"] for each in of_id] for of_id in choice.top_logprobs.tolist()] == [[5, 4], [6]]
    assert generation.prompt_logprobs is not None
    assert generation.prompt_logprobs.tolist() == [[], [{"id": 2, "logprob": -1.0}]]
