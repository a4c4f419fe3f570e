"""Rollouts, spans, resources and workers: every store has the same methods, and they do the same."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.generation import Choice
from agentlightning.rollout_records import NewRollout, RolloutConfig
from tests.common.generations import generation
from tests.store.conftest import EVERY_KIND, new_store_of

pytestmark = pytest.mark.tier("check")


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def taken(store: agl.Store, **enqueued: Any) -> tuple[agl.Rollout, agl.Attempt]:
    """Enqueue a rollout and dequeue it."""
    store.enqueue_rollout({"question": "Paris?"}, **enqueued)
    rollout = store.dequeue_rollout(worker_id="runner-1")
    assert rollout is not None
    assert rollout.attempt is not None
    return rollout, rollout.attempt


def test_an_enqueued_rollout_is_returned_as_it_was_given(store: agl.Store) -> None:
    config = RolloutConfig(timeout_seconds=60.0, max_attempts=3, retry_condition=["timeout"])

    rollout = store.enqueue_rollout({"a": [1, None, "\u00e9"]}, mode="val", config=config, metadata={"split": 2})

    assert (rollout.input, rollout.mode, rollout.config) == ({"a": [1, None, "\u00e9"]}, "val", config)
    assert (rollout.status, rollout.metadata, rollout.attempt) == ("queuing", {"split": 2}, None)
    assert store.get_rollout_by_id(rollout.rollout_id) == rollout


def test_numbers_that_json_does_not_have_become_null(store: agl.Store) -> None:
    assert store.enqueue_rollout([float("nan"), float("inf"), 1.5]).input == [None, None, 1.5]


def test_a_value_that_is_not_json_is_refused_by_an_error_of_this_package(store: agl.Store) -> None:
    with pytest.raises(agl.InvalidRecord):
        store.enqueue_rollout(object())


def test_rollouts_are_dequeued_in_the_order_in_which_they_were_enqueued(store: agl.Store) -> None:
    made = store.enqueue_rollouts([NewRollout(number) for number in range(5)])

    first, *rest = store.dequeue_rollouts(3), store.dequeue_rollout(), store.dequeue_rollout()
    assert [each.input for each in first] == [0, 1, 2]
    assert [each and each.input for each in rest] == [3, 4]
    assert store.dequeue_rollout() is None
    assert [each.rollout_id for each in made[:3]] == [each.rollout_id for each in first]


def test_a_dequeued_rollout_has_an_attempt_and_its_worker_is_busy(store: agl.Store) -> None:
    rollout, attempt = taken(store)

    assert (rollout.status, attempt.sequence_id, attempt.status) == ("preparing", 1, "preparing")
    worker = store.get_worker_by_id("runner-1")
    assert worker is not None
    assert (worker.status, worker.current_rollout_id) == ("busy", rollout.rollout_id)
    assert [each.worker_id for each in store.query_workers(status_in=["busy"])] == ["runner-1"]


def test_base_urls_name_the_rollout_and_the_attempt(store: agl.Store) -> None:
    waiting = store.enqueue_rollout(1)
    rollout = store.dequeue_rollout()

    assert rollout is not None
    assert rollout.attempt is not None
    path = f"/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}/v1"
    assert rollout.base_url("http://localhost:8000") == rollout.base_url("http://localhost:8000/v1/")
    assert rollout.base_url("http://localhost:8000") == f"http://localhost:8000{path}"
    assert waiting.base_url("http://localhost:8000") == f"http://localhost:8000/rollout/{rollout.rollout_id}/v1"
    assert waiting.api_key() == f"none@rollout={rollout.rollout_id}"
    assert rollout.api_key("KEY") == f"KEY@rollout={rollout.rollout_id},attempt={rollout.attempt.attempt_id}"


def test_a_rollout_that_is_rewarded_and_finished_has_succeeded(store: agl.Store) -> None:
    rollout, attempt = taken(store)
    call = generation(
        1,
        rollout_id=rollout.rollout_id,
        attempt_id=attempt.attempt_id,
        prompt_token_ids=array("i", [1, 2]),
        choices=[Choice(token_ids=array("i", [3]))],
    )
    store.add([call])

    rollout.reward(0.5)
    rollout.finish("succeeded")

    assert rollout.status == "succeeded"
    [found] = store.wait_for_rollouts([rollout.rollout_id], timeout=0)
    assert found.status == "succeeded"
    assert found.end_time is not None
    [triplet] = store.triplets()
    assert (triplet.prompt_token_ids, triplet.response_token_ids, triplet.reward) == (
        array("i", [1, 2]),
        array("i", [3]),
        0.5,
    )
    assert (
        [triplet] == [*rollout.triplets()] == [*attempt.triplets()] == [*store.triplets(rollout.rollout_id, "latest")]
    )
    assert [*rollout.generations()] == [call]


def test_a_failed_attempt_is_retried_if_the_config_asks_for_it(store: agl.Store) -> None:
    rollout, _ = taken(store, config=RolloutConfig(max_attempts=2, retry_condition=["failed"]))

    rollout.finish("failed")

    assert rollout.status == "requeuing"
    again = store.dequeue_rollout()
    assert again is not None
    assert again.rollout_id == rollout.rollout_id
    assert [each.sequence_id for each in store.query_attempts(rollout.rollout_id)] == [1, 2]
    again.finish("failed")
    assert again.status == "failed"


def test_an_attempt_that_is_overdue_is_ended_before_anything_is_read(store: agl.Store) -> None:
    rollout, _ = taken(store, config=RolloutConfig(timeout_seconds=0.001))
    time.sleep(0.05)

    found = store.get_rollout_by_id(rollout.rollout_id)

    assert found is not None
    assert found.attempt is not None
    assert (found.status, found.attempt.status) == ("failed", "timeout")


def test_a_heartbeat_makes_an_attempt_run(store: agl.Store) -> None:
    rollout, attempt = taken(store)

    attempt.heartbeat()

    assert attempt.status == "running"
    assert attempt.last_heartbeat_time is not None
    assert attempt == store.get_latest_attempt(rollout.rollout_id)


def test_updates_change_what_they_name_and_nothing_else(store: agl.Store) -> None:
    rollout = store.start_rollout("a task", metadata={"a": 1}, worker_id="runner-2")

    changed = store.update_rollout(rollout.rollout_id, input="another", metadata={"b": 2})
    assert (changed.input, changed.metadata, changed.status) == ("another", {"b": 2}, "preparing")
    attempt = store.update_attempt(rollout.rollout_id, "latest", status="running", metadata={"c": 3})
    assert (attempt.status, attempt.metadata, attempt.worker_id) == ("running", {"c": 3}, "runner-2")
    assert store.update_rollout(rollout.rollout_id, status="cancelled").status == "cancelled"
    assert store.start_attempt(rollout.rollout_id).status == "preparing"


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.update_rollout("nobody", status="failed"),
        lambda store: store.start_attempt("nobody"),
        lambda store: store.update_attempt("nobody", "latest", status="failed"),
        lambda store: store.heartbeat("nobody", "at-1"),
        lambda store: store.add_reward("nobody", "latest", 1.0),
        lambda store: store.add_span(agl.Span("tool", "nobody", "at-1")),
    ],
)
def test_a_change_of_an_unknown_rollout_is_not_found(store: agl.Store, act: Callable[[agl.Store], object]) -> None:
    with pytest.raises(agl.NotFound, match="nobody"):
        act(store)


def test_reading_what_is_unknown_finds_nothing(store: agl.Store) -> None:
    assert store.get_rollout_by_id("nobody") is None
    assert store.get_latest_attempt("nobody") is None
    assert store.get_resources_by_id("nobody") is None
    assert store.get_latest_resources() is None
    assert store.get_worker_by_id("nobody") is None
    assert store.query_attempts("nobody") == []
    assert store.query_spans("nobody") == []
    assert [*store.triplets("nobody", "latest")] == []
    assert store.wait_for_rollouts(["nobody"]) == []


def test_rollouts_are_filtered_sorted_and_paged(store: agl.Store) -> None:
    made = store.enqueue_rollouts([NewRollout(number) for number in range(5)])
    store.dequeue_rollouts(2)

    waiting = store.query_rollouts(status_in=["queuing"], sort_by="start_time", sort_order="desc")
    assert [each.input for each in waiting] == [4, 3, 2]
    assert [each.input for each in store.query_rollouts(limit=2, offset=1)] == [1, 2]
    wanted = [made[3].rollout_id, made[1].rollout_id]
    assert {each.input for each in store.query_rollouts(rollout_id_in=wanted)} == {1, 3}
    either = store.query_rollouts(status_in=["preparing"], rollout_id_in=wanted, filter_logic="or")
    assert {each.input for each in either} == {0, 1, 3}


def test_spans_are_returned_as_they_were_given_and_in_order(store: agl.Store) -> None:
    rollout, attempt = taken(store)
    ids = rollout.rollout_id, attempt.attempt_id

    first = store.add_span(agl.Span("agent", *ids, attributes={"a": [1, 2]}, start_time=1.0, end_time=2.5))
    assert first is not None
    second = store.add_span(agl.Span("tool", *ids, parent_id=first.span_id, trace_id=first.trace_id))

    assert second is not None
    assert (first.attributes, first.start_time, first.end_time) == ({"a": [1, 2]}, 1.0, 2.5)
    assert second.sequence_id == (first.sequence_id or 0) + 1
    assert store.query_spans(rollout.rollout_id) == store.query_spans(*ids) == [first, second]
    assert store.query_spans(rollout.rollout_id, "latest", name="tool") == [second]
    assert store.query_spans(trace_id=first.trace_id, sort_order="desc") == [second, first]
    assert store.add_span(first) is None
    assert store.get_next_span_sequence_id(*ids) > (second.sequence_id or 0)


def test_a_span_that_names_a_recorded_answer_has_its_token_ids(store: agl.Store) -> None:
    rollout, attempt = taken(store)
    choices = [Choice(token_ids=array("i", [3]), logprobs=array("f", [-0.5]))]
    recorded = generation(1, prompt_token_ids=array("i", [1, 2]), choices=choices, rollout_id=rollout.rollout_id)
    store.add([recorded])

    named = {"gen_ai.response.id": recorded.response_id}
    store.add_span(agl.Span("chat", rollout.rollout_id, attempt.attempt_id, attributes=named))

    [span] = store.query_spans(rollout.rollout_id)
    assert span.attributes["prompt_token_ids"] == [1, 2]
    assert span.attributes["response_token_ids"] == [3]


def test_a_reward_may_belong_to_one_call(store: agl.Store) -> None:
    rollout, attempt = taken(store)
    calls = [generation(number, rollout_id=rollout.rollout_id, attempt_id=attempt.attempt_id) for number in (1, 2)]
    store.add(calls)

    rollout.reward(0.25, generation_id=calls[0].id)
    attempt.reward(1.0)

    assert [each.reward for each in rollout.triplets() if each.index == 0] == [0.25, 1.0]
    with pytest.raises(agl.NotFound, match="generation"):
        rollout.reward(1.0, generation_id=generation(3).id)


LLM = {
    "resource_type": "llm",
    "endpoint": "http://localhost:8000/v1",
    "model": "m",
    "api_key": None,
    "sampling_parameters": {"temperature": 0.5},
}


def test_resources_have_versions_and_the_latest_is_given_to_new_rollouts(store: agl.Store) -> None:
    first = store.add_resources({"main": LLM})
    assert (first.version, first.resources) == (1, {"main": LLM})
    assert store.enqueue_rollout(1).resources_id == first.resources_id

    second = store.update_resources("mine", {"main": {**LLM, "model": "n"}})
    assert store.get_latest_resources() == second == store.get_resources_by_id("mine")
    assert store.update_resources("mine", {"main": LLM}).version == 2
    assert [each.resources_id for each in store.query_resources(resources_id="mine")] == ["mine"]
    assert len(store.query_resources(sort_by="version", sort_order="desc", limit=1)) == 1


def test_workers_report_what_they_measure(store: agl.Store) -> None:
    store.update_worker("runner-3", {"cpu_percent": 12.5})

    worker = store.update_worker("runner-3")

    assert (worker.heartbeat_stats, worker.status) == ({"cpu_percent": 12.5}, "unknown")
    assert [each.worker_id for each in store.query_workers(worker_id_contains="ner-3")] == ["runner-3"]


def test_statistics_count_every_kind_of_record(store: agl.Store) -> None:
    rollout, attempt = taken(store)
    store.add_span(agl.Span("tool", rollout.rollout_id, attempt.attempt_id))
    store.add([generation(1)])
    store.add_resources({})

    assert store.statistics() == {
        "total_rollouts": 1,
        "total_attempts": 1,
        "total_spans": 1,
        "total_resources": 1,
        "total_workers": 1,
        "total_generations": 1,
    }


def test_waiting_ends_when_the_rollouts_have_ended(store: agl.Store, url: str) -> None:
    rollout, _ = taken(store)
    assert store.wait_for_rollouts([rollout.rollout_id], timeout=0.01) == []

    def finish() -> None:
        with agl.open_store(url) as another:
            another.update_attempt(rollout.rollout_id, "latest", status="succeeded")

    runner = threading.Thread(target=finish)
    runner.start()
    [ended] = store.wait_for_rollouts([rollout.rollout_id])
    runner.join()
    assert ended.status == "succeeded"


def test_a_rollout_is_given_to_one_of_many_runners(store: agl.Store, url: str) -> None:
    made = store.enqueue_rollouts([NewRollout(number) for number in range(24)])
    taken_by: list[list[str]] = [[] for _ in range(4)]

    def run(number: int) -> None:
        with agl.open_store(url) as own:
            while rollout := own.dequeue_rollout(worker_id=f"runner-{number}"):
                taken_by[number].append(rollout.rollout_id)
                rollout.finish()

    runners = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for each in runners:
        each.start()
    for each in runners:
        each.join()

    assert sorted(rollout_id for some in taken_by for rollout_id in some) == sorted(each.rollout_id for each in made)
    assert {each.status for each in store.query_rollouts()} == {"succeeded"}


@pytest.mark.parametrize(
    "act",
    [
        lambda store, rollout: rollout.finish("success"),
        lambda store, rollout: store.update_rollout(rollout.rollout_id, status="done"),
        lambda store, rollout: store.enqueue_rollout(1, mode="training"),
        lambda store, rollout: store.enqueue_rollout(1, config=RolloutConfig(max_attempts=0)),
        lambda store, rollout: store.enqueue_rollout(1, config=RolloutConfig(retry_condition=["late"])),  # pyright: ignore[reportArgumentType]
        lambda store, rollout: store.add_resources({"main": {"model": "m"}}),
        lambda store, rollout: store.query_rollouts(sort_by="age"),
        lambda store, rollout: rollout.reward(float("nan")),
        lambda store, rollout: rollout.reward(float("inf")),
    ],
)
def test_a_value_that_no_store_accepts_is_refused_by_each(
    store: agl.Store, act: Callable[[agl.Store, agl.Rollout], object]
) -> None:
    rollout, _ = taken(store)

    with pytest.raises(agl.InvalidRecord):
        act(store, rollout)

    assert rollout == store.get_rollout_by_id(rollout.rollout_id)


def test_a_limit_below_one_takes_nothing_from_the_queue(store: agl.Store) -> None:
    store.enqueue_rollout(1)

    assert store.dequeue_rollouts(0) == store.dequeue_rollouts(-1) == []
    assert store.dequeue_rollout() is not None


@pytest.mark.parametrize("strange", ["a/b", "", "search", "latest", "\u00e9 %2F?#"])
def test_ids_that_no_path_can_have_are_read_like_any_other(store: agl.Store, strange: str) -> None:
    store.add_resources({"main": LLM})

    assert store.get_rollout_by_id(strange) is None
    assert store.get_resources_by_id(strange) is None
    assert store.get_worker_by_id(strange) is None
    assert store.query_spans(strange) == []
    with pytest.raises((agl.NotFound, agl.InvalidRecord)):
        store.update_rollout(strange, status="failed")


def test_a_rollout_can_be_pickled_and_copied_without_its_store(store: agl.Store) -> None:
    rollout, attempt = taken(store)

    restored = pickle.loads(pickle.dumps(rollout))

    assert restored == copy.deepcopy(rollout) == rollout
    assert (restored.store, attempt.store) == (None, store)
    assert rollout.as_dict()["attempt"]["attempt_id"] == attempt.attempt_id
    json.dumps(rollout.as_dict())


def test_a_record_without_a_store_says_so() -> None:
    with pytest.raises(TypeError, match="not returned by a store"):
        agl.Rollout("ro-1", None, 0.0).finish()
