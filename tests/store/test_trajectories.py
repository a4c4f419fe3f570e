"""Tests of trajectories, of filters of triplets, and of rewards of recorded rollouts, in stores of every kind."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentlightning.errors import NotFound, RolloutTooLarge
from agentlightning.generation import Choice, Generation, RoutedExperts
from agentlightning.rollout_records import Span
from agentlightning.sender import LostCalls, Progress, Sender
from agentlightning.store import Store, calls
from agentlightning.store.calls import MOST_IDS
from agentlightning.trajectory import Trajectory, group_of
from tests.common.generations import START, generation
from tests.store.conftest import EVERY_KIND, new_store_of

pytestmark = pytest.mark.tier("check")


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def call(number: int, prompt: list[int], answer: list[int] | None, **fields: Any) -> Generation:
    """Make call N of the attempt `a` of the rollout `r`."""
    logprobs = None if answer is None else array("f", [-0.5] * len(answer))
    choice = Choice(
        token_ids=None if answer is None else array("i", answer),
        logprobs=logprobs,
        finish_reason="stop",
        weight_versions=None if answer is None else [(f"{number}", 0, len(answer))],
    )
    usual: dict[str, Any] = {"rollout_id": "r", "attempt_id": "a", "response_id": f"answer-{number}"}
    return generation(number, **{**usual, "prompt_token_ids": array("i", prompt), "choices": [choice], **fields})


def rows(found: Iterator[Trajectory]) -> list[tuple[str | None, list[int], list[int]]]:
    return [(each.rollout_id, each.token_ids.tolist(), each.response_mask.tolist()) for each in found]


LINE = (call(1, [1, 2], [3, 4]), call(2, [1, 2, 3, 4, 5], [6]))


def test_calls_of_an_attempt_are_one_row_with_all_that_is_known(store: Store) -> None:
    started = store.start_rollout({"question": "Paris?"}, metadata={"split": 1})
    assert started.attempt is not None
    rollout_id, attempt_id = started.rollout_id, started.attempt.attempt_id
    ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    experts = RoutedExperts((3, 1, 1), array("h", [7, 8, 9]))
    first = call(1, [1, 2], [3, 4], **ids, logprobs_mode="raw_logprobs")
    first.choices[0].routed_experts = experts
    last = call(2, [1, 2, 3, 4, 5], [6], **ids, logprobs_mode="raw_logprobs")
    last.choices[0].routed_experts = RoutedExperts((5, 1, 1), array("h", [1, 1, 1, 5, 6]))
    # In the order of arrival, the last call is the first.
    store.add([last])
    store.add([first])
    store.add_reward(rollout_id, attempt_id, 0.25, first.id)
    store.add_reward(rollout_id, attempt_id, 1.0)

    (row,) = started.trajectories()

    assert row.token_ids == array("i", [1, 2, 3, 4, 5, 6])
    assert row.response_mask == array("b", [0, 0, 1, 1, 0, 1])
    assert row.logprobs == array("f", [0, 0, -0.5, -0.5, 0, -0.5])
    assert (row.prompt_length, row.index, row.count, row.parent) == (2, 0, 1, None)
    assert [(each.generation_id, each.start, each.end) for each in row.spans] == [(first.id, 2, 4), (last.id, 5, 6)]
    assert (row.reward, row.rewards) == (1.0, [(3, 0.25), (5, 1.0)])
    assert (row.rollout_id, row.attempt_id, row.model) == (rollout_id, attempt_id, "tiny-model")
    assert row.weight_versions == [("1", 2, 4), ("2", 5, 6)]
    assert row.routed_experts == RoutedExperts((6, 1, 1), array("h", [7, 8, 9, 5, 6, -1]))
    assert (row.logprobs_mode, row.temperature) == ("raw_logprobs", 0.7)
    assert row.spans[0].sampling is not None
    assert row.spans[0].sampling["top_p"] == 0.95
    assert row.flags == ["mixed_weights"]
    assert (row.input, row.metadata) == ({"question": "Paris?"}, {"split": 1})
    assert row.group == group_of({"question": "Paris?"}, None)
    assert [*started.attempt.trajectories()] == [*store.trajectories()] == [row]


def test_options_reach_the_merging(store: Store) -> None:
    store.add([LINE[0], call(2, [1, 2, 3, 4, 5], [6, 7]), call(3, [1, 2, 3, 4, 5, 6, 9], [8])])

    assert [each[2] for each in rows(store.trajectories("r"))] == [[0, 0, 1, 1, 0, 1, 1], [0] * 7 + [1]]
    assert [each[2] for each in rows(store.trajectories("r", drift="realign"))] == [[0, 0, 1, 1, 0, 1, 0, 1]]
    assert len([*store.trajectories("r", drift="transition")]) == 3
    assert len([*store.trajectories("r", complete=True, max_length=7)]) == 1
    assert [*store.trajectories("r", min_reward=0.0)] == []


def test_calls_by_two_names_that_one_model_answered_are_one_conversation(store: Store) -> None:
    named = {"served_model": "tiny-model"}
    store.add(
        [
            call(1, [1, 2], [3, 4], model="claude-opus-9", **named),
            call(2, [1, 2, 3, 4, 5], [6], model="claude-haiku-9", **named),
            call(3, [1, 2, 3, 4, 5, 6, 7], [8], model="tiny-model"),
        ]
    )

    [row] = store.trajectories("r")
    assert (row.model, row.response_mask.tolist()) == ("tiny-model", [0, 0, 1, 1, 0, 1, 0, 1])
    assert [*store.trajectories("r", model="tiny-model")] == [row]
    assert [*store.trajectories("r", model="claude-opus-9")] == []
    [drift] = store.drift("r")
    assert (drift.calls, drift.breaks) == (3, [])


def test_attempts_have_rows_and_rewards_of_their_own(store: Store) -> None:
    rollout = store.start_rollout(None)
    assert rollout.attempt is not None
    attempts = [rollout.attempt.attempt_id]
    again = store.start_attempt(rollout.rollout_id).attempt
    assert again is not None
    attempts.append(again.attempt_id)
    for number, attempt_id in enumerate(attempts):
        store.add([call(number, [1, 2], [3], rollout_id=rollout.rollout_id, attempt_id=attempt_id)])
        store.add_reward(rollout.rollout_id, attempt_id, float(number))

    found = [*store.trajectories(rollout.rollout_id)]

    assert [(each.attempt_id, each.reward, each.count) for each in found] == [
        (attempts[0], 0.0, 1),
        (attempts[1], 1, 1),
    ]
    assert [each.attempt_id for each in store.trajectories(rollout.rollout_id, "latest")] == attempts[1:]
    assert [each.attempt_id for each in store.trajectories(rollout.rollout_id, attempts[0])] == attempts[:1]


def test_calls_without_an_attempt_belong_to_the_only_one(store: Store) -> None:
    store.add([LINE[0], call(2, [1, 2, 3, 4, 5], [6], attempt_id=None)])
    store.add([call(3, [1], [2], rollout_id="s"), call(4, [1, 2, 3], [4], rollout_id="s", attempt_id="b")])
    store.add([call(5, [1, 2, 3, 4], [5], rollout_id="s", attempt_id=None)])

    assert [(each.attempt_id, len(each.spans)) for each in store.trajectories("r")] == [("a", 2)]
    found = [(each.attempt_id, len(each.spans)) for each in store.trajectories("s")]
    assert found == [("a", 1), ("b", 1), (None, 1)]


def test_a_missing_call_flags_the_rows_of_its_attempt(store: Store) -> None:
    rollout = store.start_rollout(None)
    assert rollout.attempt is not None
    ids: dict[str, Any] = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    store.add([call(1, [1, 2], [3], **ids)])
    store.add_span(Span("openai.chat.completion", **ids, attributes={"gen_ai.response.id": "elsewhere"}))

    assert [each.flags for each in store.trajectories(rollout.rollout_id)] == [["missing_call"]]


def test_an_attempt_without_rows_is_logged_with_the_reason(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add([call(1, [1, 2], None), call(2, [1, 2], [])])
    with caplog.at_level(logging.WARNING, "agentlightning.store"):
        assert [*store.trajectories("r")] == []

    if "database" in type(store).__module__:
        assert "has calls, but no trajectory: 1 empty_answer, 1 without_ids" in caplog.text


def lose(store: Store, rollout_id: str, attempt_id: str | None, count: int) -> None:
    """Report, as a server does, that calls of an attempt could not be stored."""
    sender = Sender(host="gpu-1", pid=7, started_at=1, version="0.1.0")
    store.register_sender(sender)
    lost = LostCalls(rollout_id=rollout_id, attempt_id=attempt_id, count=count, reason="queue_full")
    store.report_progress(sender.id, Progress(watermark=1, store_time=None, lost=[lost]))


@pytest.mark.parametrize(
    ("attempt_id", "flagged"), [("a", ["a"]), ("b", ["b"]), (None, ["a", "b"])], ids=["one", "other", "any"]
)
def test_a_lost_call_flags_the_rows_of_its_attempt(store: Store, attempt_id: str | None, flagged: list[str]) -> None:
    store.add([*LINE, call(3, [7], [8], attempt_id="b")])
    lose(store, "r", attempt_id, 3)

    found = {each.attempt_id: each.flags for each in store.trajectories("r") if "missing_call" in each.flags}
    assert [*found] == flagged
    assert {each.attempt_id for each in store.trajectories("r", complete=True)} == {"a", "b"} - {*flagged}
    assert ["missing_call" in each.flags for each in store.trajectories("r", "a")] == ["a" in flagged]


def test_an_attempt_whose_calls_are_all_missing_is_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    rollout = store.start_rollout(None)
    assert rollout.attempt is not None
    ids: dict[str, Any] = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    store.add_span(Span("openai.chat.completion", **ids, attributes={"gen_ai.response.id": "elsewhere"}))
    lose(store, "r", "a", 3)
    with caplog.at_level(logging.WARNING, "agentlightning.store"):
        assert [*store.trajectories("r"), *store.trajectories(rollout.rollout_id)] == []

    if "database" in type(store).__module__:
        assert "attempt 'a' of rollout 'r' has calls, but no trajectory: 3 missing" in caplog.text
        assert f"of rollout {rollout.rollout_id!r} has calls, but no trajectory: 1 missing" in caplog.text


def test_rows_that_a_filter_leaves_out_are_not_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add([*LINE, call(3, [1, 2], [])])
    with caplog.at_level(logging.WARNING, "agentlightning.store"):
        assert [*store.trajectories("r", min_reward=2.0)] == []

    assert "no trajectory" not in caplog.text


def test_an_attempt_has_the_rows_that_it_has_among_all_of_its_rollout(store: Store) -> None:
    rollout = store.start_rollout(None)
    assert rollout.attempt is not None
    ids: dict[str, Any] = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    store.add([call(1, [1], [2], **{**ids, "attempt_id": None}), call(2, [1, 2, 3], [4], **ids)])

    found = [*store.trajectories(rollout.rollout_id)]

    assert [row.response_mask.tolist() for row in found] == [[0, 1, 0, 1]]
    for attempt_id in (rollout.attempt.attempt_id, "latest"):
        assert [*store.trajectories(rollout.rollout_id, attempt_id)] == found


def test_calls_without_an_attempt_take_the_reward_of_none_of_several(store: Store) -> None:
    for number, rollout_id in enumerate(("r", "s")):
        named = [call(3 * number + 1, [1], [2], rollout_id=rollout_id, attempt_id="a1")]
        if rollout_id == "r":
            named.append(call(3 * number + 2, [3], [4], rollout_id=rollout_id, attempt_id="a2"))
        store.add([*named, call(3 * number + 3, [5], [6], rollout_id=rollout_id, attempt_id=None)])
        for each, reward in zip(named, (1.0, 0.0), strict=False):
            store.add_reward(rollout_id, each.attempt_id or "", reward)

    assert [(each.attempt_id, each.reward) for each in store.trajectories("r")] == [
        ("a1", 1.0),
        ("a2", 0.0),
        (None, None),
    ]
    assert [(each.attempt_id, each.reward) for each in store.trajectories("s")] == [("a1", 1.0), ("a1", 1.0)]


def test_a_choice_that_ended_by_itself_is_finished_though_another_was_aborted(store: Store) -> None:
    choices = [
        Choice(token_ids=array("i", [3]), finish_reason="stop"),
        Choice(index=1, token_ids=array("i", [4]), finish_reason="abort"),
    ]
    store.add([call(1, [1, 2], [3], choices=choices, status="aborted")])

    found = [*store.trajectories("r")]
    assert [(each.spans[0].status, each.flags) for each in found] == [("finished", []), ("aborted", ["aborted"])]
    assert [each.index for each in store.trajectories("r", complete=True)] == [0]


def test_unknown_rollouts_and_attempts_have_no_rows(store: Store) -> None:
    store.add(LINE)

    for found in (("s",), ("r", "b"), ("r", "latest"), ("a/b",), ("",)):
        assert [*store.trajectories(*found)] == []
        assert [*store.triplets(*found)] == []


@pytest.mark.parametrize("options", [{"drift": "guess"}, {"max_length": -1}, {"max_staleness": 1}])
def test_senseless_options_are_refused(store: Store, options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        store.trajectories(**options)


def of_many(store: Store) -> None:
    for number in range(4):
        ids = {"rollout_id": f"r{number}", "attempt_id": "a"}
        status: Any = "aborted" if number == 1 else "finished"
        store.add([call(2 * number, [1, 2], [3], **ids), call(2 * number + 1, [1, 2, 3], [4], **ids, status=status)])


@pytest.mark.parametrize("what", ["trajectories", "triplets"])
def test_all_rollouts_are_read_in_pages(store: Store, what: str) -> None:
    of_many(store)
    read: Any = getattr(store, what)

    def named(**page: Any) -> list[str]:
        return [*dict.fromkeys(each.rollout_id for each in read(**page))]

    assert named() == ["r0", "r1", "r2", "r3"]
    assert named(limit=2) == ["r0", "r1"]
    assert named(limit=2, after="r1") == ["r2", "r3"]
    assert named(after="r3") == []
    assert named(since=START + 4 * 10**9) == ["r2", "r3"]
    assert named(since=START + 4 * 10**9, after="r2") == ["r3"]
    with pytest.raises(NotFound, match="'nobody'"):
        named(after="nobody")


def test_a_call_that_finished_early_and_arrives_late_moves_no_rollout(store: Store) -> None:
    of_many(store)
    first = [*dict.fromkeys(each.rollout_id for each in store.trajectories(limit=2))]

    # It finished before all others.
    store.add([call(9, [7], [8], rollout_id="r2", finished_at=START - 10**9)])
    store.add([call(10, [7], [8], rollout_id="late", finished_at=START - 2 * 10**9)])

    rest = [*dict.fromkeys(each.rollout_id for each in store.trajectories(after=first[-1] or ""))]
    assert (first, rest) == (["r0", "r1"], ["r2", "r3", "late"])


def test_triplets_are_filtered(store: Store) -> None:
    of_many(store)
    last = next(each for each in store.generations(rollout_id="r0") if each.response_id == "answer-1")
    store.add_reward("r0", "a", 0.5, last.id)

    def named(**filters: Any) -> list[str | None]:
        return [each.response_id for each in store.triplets(**filters)]

    assert named(status="aborted") == ["answer-3"]
    assert named(min_reward=0.5) == ["answer-1"]
    assert named(min_reward=0.6) == []
    assert named(weight_version="4") == ["answer-4"]
    assert named(rollout_id="r2", since=START + 5 * 10**9) == ["answer-5"]


def test_triplets_have_the_finish_reason_and_what_the_rollout_is(store: Store) -> None:
    rollout = store.start_rollout([1], metadata={"k": "v"})
    first = call(1, [1], [2], rollout_id=rollout.rollout_id)
    store.add([first, call(2, [1], None, rollout_id="only recorded", choices=[])])

    (known,) = store.triplets(rollout.rollout_id)
    (recorded,) = store.triplets("only recorded")

    assert (known.finish_reason, known.input, known.metadata) == ("stop", [1], {"k": "v"})
    assert (recorded.finish_reason, recorded.input, recorded.metadata) == (None, None, None)


def test_a_rollout_that_was_only_recorded_is_rewarded(store: Store) -> None:
    store.add([*LINE, call(3, [9], [9], rollout_id="s", attempt_id=None)])

    store.add_reward("r", "latest", 0.25)
    store.add_reward("r", "a", 0.5, LINE[0].id)
    store.add_reward("s", "latest", 1.0)

    assert [each.reward for each in store.triplets("r")] == [0.5, 0.25]
    assert [(each.reward, each.rewards) for each in store.trajectories("r")] == [(0.25, [(3, 0.5), (5, 0.25)])]
    assert [each.reward for each in store.triplets("s")] == [1.0]
    assert store.get_rollout_by_id("r") is None


def test_a_reward_for_an_attempt_that_was_neither_created_nor_recorded_is_not_found(store: Store) -> None:
    store.add(LINE)
    created = store.start_rollout(None)

    for rollout_id, attempt_id in (("r", "b"), ("s", "latest"), (created.rollout_id, "a")):
        with pytest.raises(NotFound):
            store.add_reward(rollout_id, attempt_id, 1.0)


@pytest.mark.tier("test")
def test_a_rollout_that_is_too_large_is_refused_by_a_sentence_and_others_are_read(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ids = 1 << 22
    count = MOST_IDS // ids + 1
    long = array("i", bytes(4 * ids))
    for number in range(count):
        # Stored once: all of them share its blocks.
        store.add([call(number, [], [1], prompt_token_ids=long)])
    store.add([call(count, [1, 2], [3], rollout_id="other")])

    for read in (store.trajectories, store.triplets, store.drift):
        reason = f"'r' has {count} calls, whose prompts have {count * ids:,} ids, more than are read at once"
        with pytest.raises(RolloutTooLarge, match=reason):
            list(read("r"))
        with caplog.at_level(logging.WARNING):
            assert {each.rollout_id for each in read()} == {"other"}
        assert "the rollout 'r' has" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("new_store", EVERY_KIND[:2], indirect=True)
def test_a_rollout_of_too_many_calls_is_refused_by_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_CALLS", 1)
    store.add(LINE)

    with pytest.raises(RolloutTooLarge, match="the rollout 'r' has 2 calls, more than are read at once"):
        list(store.trajectories("r"))


def test_rows_are_json(store: Store) -> None:
    store.add(LINE)
    (row,) = store.trajectories("r")

    assert Trajectory.from_dict(json.loads(json.dumps(row.as_dict()))) == row
