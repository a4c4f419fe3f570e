"""Sampling parameters that are pinned, on vLLM's own class, in processes that are forked for each test."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from agentlightning import instrumentation
from agentlightning.instrumentation.vllm import _context, _releases, _strict, sampling
from agentlightning.instrumentation.vllm._carriers import PROBE_PARAMS
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import engine_core
from agentlightning.sampling import NEUTRAL

pytestmark = pytest.mark.forked

PINNED = "temperature=1,top_p=1,top_k=-1,min_p=0,repetition_penalty=1"
CHAT = "/v1/chat/completions"
VLLMS_OWN = SamplingParams._verify_args


def armed(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AGL_SAMPLING", value)
    instrumentation.instrument_vllm()


def made(context: RequestContext | None = None, **params: Any) -> tuple[SamplingParams, RequestContext]:
    """Make parameters while a request is served, and copy them as vLLM does."""
    context = context or RequestContext(endpoint=CHAT)
    return _context.call_in(context, lambda: copy.deepcopy(SamplingParams(**params))), context


def test_while_it_is_off_nothing_is_patched_and_undoing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    instrumentation.instrument_vllm()
    assert SamplingParams._verify_args is VLLMS_OWN
    assert sampling.report() is None
    instrumentation.uninstrument_vllm()

    armed(monkeypatch, PINNED)
    assert SamplingParams._verify_args is not VLLMS_OWN
    instrumentation.uninstrument_vllm()

    assert SamplingParams._verify_args is VLLMS_OWN
    assert made(temperature=0)[0].temperature == 0


def test_what_is_pinned_takes_the_place_of_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, PINNED)

    params, context = made(temperature=0, top_p=0.8, top_k=20, min_p=0.1, repetition_penalty=1.2, n=2, max_tokens=7)

    assert params == copy.deepcopy(SamplingParams(n=2, top_k=-1, max_tokens=7))
    asked = {"temperature": 0, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    assert context.replaced == asked
    assert sampling.report() == {"mode": "pin", "pins": PINNED, "differing": dict.fromkeys(asked, 1)}


def test_a_greedy_request_keeps_what_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "temperature=1")

    params, _ = made(temperature=0, top_p=0.8, top_k=20, seed=3)

    assert params == copy.deepcopy(SamplingParams(temperature=1, top_p=0.8, top_k=20, seed=3))


def test_what_vllm_refuses_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, PINNED)

    for invalid in ({"temperature": 7}, {"top_p": 0}, {"max_tokens": 0}):
        with pytest.raises(VLLMValidationError):
            made(None, **invalid)


@pytest.mark.parametrize(
    "context",
    [
        None,
        RequestContext(endpoint="AsyncLLM.generate"),
        RequestContext(endpoint=CHAT, is_search=True),
        RequestContext(endpoint=CHAT, sampling={}),
    ],
    ids=["no request", "a program's own", "a beam search", "a rollout that keeps its client's"],
)
def test_what_is_not_to_be_pinned_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, context: RequestContext | None
) -> None:
    armed(monkeypatch, PINNED)

    params = SamplingParams(temperature=0.3) if context is None else made(context, temperature=0.3)[0]

    assert params.temperature == 0.3
    assert made(temperature=0.3)[0].temperature == 1


def test_a_rollouts_own_pins_come_before_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, PINNED)

    params, context = made(RequestContext(endpoint=CHAT, sampling={"top_p": 0.9}), temperature=0.3, top_p=0.5)

    assert (params.temperature, params.top_p, context.replaced) == (0.3, 0.9, {"top_p": 0.5})


def entered(params: SamplingParams, **fields: Any) -> Any:
    """Let a request enter an engine core that no frontend of ours stands before, and return it."""
    request = SimpleNamespace(request_id="cmpl-1-0", sampling_params=params, **fields)
    engine_core.wrap_add_request(lambda self, request: None)(SimpleNamespace(requests={}), request)
    return request


def test_requests_without_a_mark_are_pinned_when_they_enter_an_engine_core_that_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed(monkeypatch, PINNED)
    params = SamplingParams(temperature=0.3, top_p=0.5, top_k=7, max_tokens=7, seed=3)
    before = copy.deepcopy(params)

    # Without a store, no frontend marks its requests: this may be one that a rollout's own pins have reached.
    monkeypatch.setattr(_releases, "uses_rust_frontend", lambda: True)
    assert entered(params).sampling_params is params
    monkeypatch.setattr(type(engine_core.session), "is_recording", property(lambda _: True))
    monkeypatch.setattr(engine_core, "_track", lambda *_: None)
    found = entered(params).sampling_params

    assert found == copy.deepcopy(SamplingParams(top_k=-1, max_tokens=7, seed=3))
    # It may be shared.
    assert params == before
    probe: Any = PROBE_PARAMS
    for left_alone in (SamplingParams(**probe), SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=1)):
        assert entered(left_alone).sampling_params is left_alone
    assert entered(params, resumable=True).sampling_params is params
    assert entered(params, abort_immediately=True).sampling_params is params


def test_a_request_that_vllm_makes_of_another_one_is_pinned_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "temperature=1")
    shared = SamplingParams(temperature=0.3, n=2)
    child, parent = (SimpleNamespace(sampling_params=shared) for _ in range(2))

    assert sampling.pin_unseen(child, parent) == {"temperature": 0.3}
    assert sampling.pin_unseen(child, parent) is None
    assert [each.sampling_params.temperature for each in (child, parent)] == [1, 1]
    assert shared.temperature == 0.3


@pytest.mark.parametrize(
    ("pins", "names", "says"),
    [
        ("off", "off", ""),
        ("report", "off", "; AGL_SAMPLING=report does not reach it"),
        ("rollout", "any", "; AGL_SAMPLING=rollout does not reach it; AGL_MODEL_NAMES does not reach it"),
        ("temperature=1", "off", "; temperature=1 is pinned for all, and a rollout's own parameters do not reach it"),
    ],
)
def test_a_frontend_that_requests_reach_otherwise_says_what_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch, pins: str, names: str, says: str
) -> None:
    monkeypatch.setenv("AGL_MODEL_NAMES", names)
    armed(monkeypatch, pins)

    assert _strict.unreached() == says


def test_calls_of_the_doctor_keep_the_parameters_that_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, PINNED)

    params, _ = made(None, **PROBE_PARAMS)

    assert (params.temperature, params.top_p) == tuple(PROBE_PARAMS.values())


@pytest.mark.parametrize(
    "params",
    [
        {"logprob_token_ids": [5, 6], "max_tokens": 1},
        {"logprob_token_ids": [5, 6], "max_tokens": 2},
        {"prompt_logprobs": 0, "max_tokens": 1},
    ],
)
def test_requests_that_only_score_are_left_alone(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    armed(monkeypatch, PINNED)

    scored, context = made(None, temperature=0, **params)
    drawn, _ = made(None, temperature=0, **params | {"max_tokens": 16})

    assert (scored.temperature, context.replaced) == (0, None)
    assert drawn.temperature == 1


@pytest.mark.parametrize(
    ("pins", "wrong"),
    [
        (PINNED, "top_k=-1"),
        ("temperature=0,top_k=20", "temperature=0"),
        ("temperature=1,top_p=0.9", None),
        ("temperature=1,top_k=20", None),
        ("report", None),
        ("rollout", None),
    ],
)
def test_pins_that_vllm_refuses_with_masks_are_named(
    monkeypatch: pytest.MonkeyPatch, pins: str, wrong: str | None
) -> None:
    def limits(**options: bool) -> list[str]:
        engine = SimpleNamespace(model_config=SimpleNamespace(**options))
        return _strict.limits(SimpleNamespace(state=SimpleNamespace(engine_client=engine)))

    armed(monkeypatch, pins)

    assert limits() == limits(return_sampling_mask=False) == []
    found = limits(return_sampling_mask=True)
    assert [each.partition(", and")[0] for each in found] == ([f"AGL_SAMPLING pins {wrong}"] if wrong else [])


def test_reporting_counts_each_call_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(5)
    expected: list[SamplingParams] = []
    params = [
        {"temperature": drawn.choice([0, 0.5, 1]), "top_p": drawn.choice([0.5, 1]), "top_k": drawn.choice([-1, 0, 4])}
        for _ in range(200)
    ]
    expected = [copy.deepcopy(SamplingParams(**each)) for each in params]
    armed(monkeypatch, "report")

    for each, plain in zip(params, expected, strict=True):
        found, context = made(**each)
        assert found == plain
        assert context.replaced is None

    differing = {
        "temperature": sum(each["temperature"] != 1 for each in params),
        "top_p": sum(each["top_p"] != 1 for each in params),
        "top_k": sum(each["top_k"] == 4 for each in params),
    }
    report = sampling.report()
    assert report is not None
    assert report["differing"] == differing
    assert json.dumps(report)


def test_the_neutral_values_are_those_of_vllm() -> None:
    defaults = SamplingParams()

    assert {name: max(getattr(defaults, name), -1) if name != "top_k" else -1 for name in NEUTRAL} == NEUTRAL
