"""Requests that are under way: each stays so until it is recorded, so that no moment passes in which nobody has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import frontend as frontend_module
from agentlightning.instrumentation.vllm.capture import unmarked as unmarked_module
from agentlightning.instrumentation.vllm.capture.conversion import CapturedRequest
from agentlightning.instrumentation.vllm.capture.frontend import PendingRequests
from agentlightning.instrumentation.vllm.capture.session import Session
from agentlightning.instrumentation.vllm.capture.unmarked import UnmarkedRequests

pytestmark = pytest.mark.tier("check")

Whose = tuple[str | None, str | None]


def request(name: str) -> Any:
    params = SimpleNamespace(logprobs=None, prompt_logprobs=None)
    return SimpleNamespace(request_id=name, arrival_time=0.0, prompt_token_ids=[1], sampling_params=params)


def state(parent: Any = None, index: int = 0) -> Any:
    return SimpleNamespace(
        queue=SimpleNamespace(output=None),
        parent_req=parent,
        request_index=index,
        logprobs_processor=SimpleNamespace(prompt_logprobs=None),
    )


def output(name: str) -> Any:
    return SimpleNamespace(request_id=name, finish_reason="stop", stop_reason=None)


def context(number: int) -> RequestContext:
    return RequestContext(rollout_id=f"r-{number}", attempt_id=f"a-{number}")


class Frontend:
    """Pending requests, and what was under way whenever one of them was recorded."""

    def __init__(self) -> None:
        self.seen: list[list[Whose]] = []
        self.pending = PendingRequests(self._record)

    def _record(self, captured: CapturedRequest) -> None:
        self.seen.append(self.pending.under_way())


@pytest.mark.parametrize(
    "end",
    [
        lambda pending: pending.finish(output("one")),
        lambda pending: pending.end(["one", "one", "unknown"], "abort"),
        lambda pending: pending.end_all("error"),
    ],
    ids=["finished", "aborted", "failed"],
)
def test_a_request_is_under_way_until_it_is_recorded(end: Callable[[PendingRequests], None]) -> None:
    frontend = Frontend()
    frontend.pending.add(state(), request("one"), None, context(1))
    assert frontend.pending.under_way() == [("r-1", "a-1")]

    end(frontend.pending)

    assert frontend.seen == [[("r-1", "a-1")]]
    assert frontend.pending.under_way() == []
    assert len(frontend.pending) == 0


def test_the_choices_of_a_request_are_under_way_as_one_until_the_last_is_recorded() -> None:
    frontend, parent = Frontend(), SimpleNamespace(request_id="both", n=2, sampling_params=None)
    for index in range(2):
        frontend.pending.add(state(parent, index), request(f"{index}_both"), parent, context(1))
    frontend.pending.add(state(), request("other"), None, None)
    whose = [("r-1", "a-1"), (None, None)]
    assert sorted(frontend.pending.under_way(), key=str) == sorted(whose, key=str)

    frontend.pending.finish(output("0_both"))
    assert len(frontend.pending.under_way()) == 2
    frontend.pending.finish(output("1_both"))

    assert [sorted(each, key=str) for each in frontend.seen] == [sorted(whose, key=str)]
    assert frontend.pending.under_way() == [(None, None)]


def test_a_request_that_cannot_be_recorded_is_not_under_way_for_ever() -> None:
    def fail(captured: CapturedRequest) -> None:
        raise LookupError

    pending = PendingRequests(fail)
    pending.add(state(), request("one"), None, context(1))

    with pytest.raises(LookupError):
        pending.finish(output("one"))

    assert pending.under_way() == []


def finish_one(pending: PendingRequests) -> None:
    pending.finish(output("one"))


def abort_all(pending: PendingRequests) -> None:
    pending.end_all("abort")


def lose_all(pending: PendingRequests) -> None:
    pending.lose_all(LookupError("no such thing"))


@pytest.mark.parametrize("cannot", ["record", "read"])
@pytest.mark.parametrize("end", [finish_one, abort_all, lose_all])
def test_a_request_that_cannot_be_recorded_is_lost_before_it_is_not_under_way(
    end: Callable[[PendingRequests], None], cannot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[tuple[Whose, list[Whose], str]] = []

    def fail(*args: object) -> None:
        raise LookupError("no such thing")

    if cannot == "read":
        monkeypatch.setattr(frontend_module, "_routed_experts", fail)
    pending = PendingRequests(
        fail, note_lost=lambda captured, error: lost.append((captured.whose(), pending.under_way(), repr(error)))
    )
    parent = SimpleNamespace(request_id="both", n=2, sampling_params=None)
    pending.add(state(parent), request("one"), parent, context(1))
    pending.add(state(parent, 1), request("two"), parent, context(1))

    with contextlib.suppress(LookupError):
        end(pending)
    with contextlib.suppress(LookupError):
        pending.finish(output("two"))

    assert lost[0] == (("r-1", "a-1"), [("r-1", "a-1")], "LookupError('no such thing')")
    assert {whose for whose, _, _ in lost} == {("r-1", "a-1")}
    assert pending.under_way() == []


def test_a_request_of_an_engine_core_that_cannot_be_recorded_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[tuple[Whose, list[Whose]]] = []

    def fail(*args: object) -> None:
        raise LookupError

    recorder = SimpleNamespace(note_lost=lambda whose, error: lost.append((whose(), unmarked.under_way())))
    settings = SimpleNamespace(logprobs=False, record_text=True)
    monkeypatch.setattr(unmarked_module, "session", SimpleNamespace(settings=settings, record=fail, recorder=recorder))
    monkeypatch.setattr("agentlightning.instrumentation.vllm._releases.uses_rust_frontend", lambda: True)
    unmarked = UnmarkedRequests(SimpleNamespace())
    known = request("chatcmpl-r-1.a-1-0123abcd")
    unmarked.track(SimpleNamespace(**vars(known), output_token_ids=[2], lora_request=None))

    unmarked.end_all("abort")

    assert lost == [(("r-1", "a-1"), [("r-1", "a-1")])]
    assert unmarked.under_way() == []


def test_unfinished_requests_are_lost_when_the_patches_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Whose] = []
    pending = PendingRequests(lambda captured: None, note_lost=lambda captured, error: lost.append(captured.whose()))
    pending.add(state(), request("one"), None, context(1))
    monkeypatch.setattr(frontend_module, "_pending", {object(): pending})

    frontend_module.forget_all()

    assert (lost, pending.under_way()) == ([("r-1", "a-1")], [])


def test_a_forked_child_has_nothing_of_its_parent_under_way() -> None:
    session, frontend = Session(), Frontend()
    session.follow(frontend.pending)
    frontend.pending.add(state(), request("one"), None, context(1))

    session.begin_in_child()

    assert session._under_way() == []


def test_a_request_of_an_engine_core_is_under_way_until_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Whose], Whose]] = []

    def record(build: object, token_ids: int, more_bytes: int, whose: Callable[[], Whose]) -> None:
        seen.append((unmarked.under_way(), whose()))

    settings = SimpleNamespace(logprobs=False, record_text=True)
    monkeypatch.setattr(unmarked_module, "session", SimpleNamespace(settings=settings, record=record))
    monkeypatch.setattr("agentlightning.instrumentation.vllm._releases.uses_rust_frontend", lambda: True)
    unmarked = UnmarkedRequests(SimpleNamespace())
    known = request("chatcmpl-r-1.a-1-0123abcd")
    unmarked.track(SimpleNamespace(**vars(known), output_token_ids=[2], lora_request=None))
    assert unmarked.under_way() == [("r-1", "a-1")]

    unmarked.end_all("abort")

    assert seen == [([("r-1", "a-1")], ("r-1", "a-1"))]
    assert unmarked.under_way() == []


def test_all_that_a_session_follows_is_under_way() -> None:
    session, first, second = Session(), Frontend(), Frontend()
    for number, each in enumerate((first, second)):
        session.follow(each.pending)
        each.pending.add(state(), request("one"), None, context(number))

    assert sorted(session._under_way(), key=str) == [("r-0", "a-0"), ("r-1", "a-1")]
    del first.pending
    assert session._under_way() == [("r-1", "a-1")]


def test_a_client_opens_the_store_before_it_reads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(frontend_module, "start", lambda patience: steps.append("store"))
    for name in ("_note_logprobs_mode", "_note_engine"):
        monkeypatch.setattr(frontend_module, name, lambda client, config, name=name: steps.append(name))

    frontend_module.wrap_client_init(lambda self, config: steps.append("init"))(object(), None)

    assert steps == ["init", "_note_logprobs_mode", "store", "_note_engine"]
