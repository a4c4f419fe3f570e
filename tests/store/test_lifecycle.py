"""Tests of what many ask for at once, and is written together: the outcomes are those of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.rollout_records import NewRollout, Span, with_ids
from agentlightning.store import ingestion, lifecycle, rollouts, spans, workers
from agentlightning.store.database import Database
from tests.store.conftest import EVERY_KIND, new_store_of

pytestmark = pytest.mark.tier("check")


@pytest.fixture(scope="session", params=EVERY_KIND[:2])
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def test_changes_of_one_rollout_that_are_written_together_follow_each_other(database: Database) -> None:
    with database.writing() as connection:
        one, other = lifecycle.start_all(connection, [lifecycle.Start(NewRollout(n), "w") for n in range(2)])
        found = lifecycle.update_attempts(
            connection,
            [
                lifecycle.AttemptChange(one.rollout_id, "latest", {"status": "running", "metadata": {"n": 1}}),
                lifecycle.AttemptChange(other.rollout_id, other.attempt_id, {"status": "failed"}),
                lifecycle.AttemptChange(one.rollout_id, one.attempt_id, {"status": "succeeded"}),
            ],
        )
        are_alive = lifecycle.heartbeats(
            connection,
            [(one.rollout_id, one.attempt_id), ("nobody", "none"), (one.rollout_id, one.attempt_id)],
        )
        states = rollouts.statuses(connection, [one.rollout_id, other.rollout_id])

    assert [(each.attempt_id, each.status, each.metadata) for each in found] == [
        (one.attempt_id, "running", '{"n":1}'),
        (other.attempt_id, "failed", None),
        (one.attempt_id, "succeeded", '{"n":1}'),
    ]
    assert are_alive == [True, False, True]
    assert {states[one.rollout_id][0], states[other.rollout_id][0]} == {"succeeded", "failed"}


def test_value_that_the_database_refuses_is_the_reason_and_the_connection_goes_on(database: Database, url: str) -> None:
    if "postgresql" not in url:
        pytest.skip("SQLite takes any value")
    with database.writing() as connection:
        [one] = lifecycle.start_all(connection, [lifecycle.Start(NewRollout(1), "w")])
    change = lifecycle.AttemptChange(one.rollout_id, "latest", {"last_heartbeat_time": "noon", "status": "running"})
    with pytest.raises(InvalidRecord, match="noon"), database.writing() as connection:
        lifecycle.update_attempts(connection, [change])

    with database.writing() as connection:
        assert lifecycle.heartbeats(connection, [(one.rollout_id, one.attempt_id)]) == [True]


def test_workers_that_ask_together_get_different_rollouts_in_the_order_of_the_queue(database: Database) -> None:
    with database.writing() as connection:
        ids = lifecycle.enqueue(connection, [NewRollout(n) for n in range(4)])
        wanted = [
            lifecycle.Dequeue(1, "a"),
            lifecycle.Dequeue(0, "b"),
            lifecycle.Dequeue(2, "c"),
            lifecycle.Dequeue(5, "d"),
        ]
        taken = lifecycle.dequeue_all(connection, [*wanted, lifecycle.Dequeue(1, "e")])
        found = {each: workers.find(connection, each) for each in "abcde"}

    assert [[row.rollout_id for row in rows] for rows in taken] == [ids[:1], [], ids[1:3], ids[3:], []]
    assert {name: row.status for name, row in found.items() if row is not None} == {
        **dict.fromkeys("acd", "busy"),
        **dict.fromkeys("be", "idle"),
    }
    assert all(row is not None and row.last_dequeue_time is not None for row in found.values())


def test_spans_written_together_get_their_numbers_and_one_that_is_known_has_the_others_written_again(
    database: Database,
) -> None:
    def a_span(rollout_id: str, attempt_id: str, sequence_id: int | None = None) -> spans.NewSpan:
        return spans.new_span(with_ids(Span("a span", rollout_id, attempt_id, sequence_id=sequence_id).as_dict()))

    with database.writing() as connection:
        one, other = lifecycle.start_all(connection, [lifecycle.Start(NewRollout(n)) for n in range(2)])
        new = [
            a_span(one.rollout_id, one.attempt_id, 7),
            a_span(one.rollout_id, one.attempt_id),
            a_span(other.rollout_id, other.attempt_id),
        ]
        stored = ingestion.add_spans(connection, new)
        [again] = ingestion.add_spans(connection, [new[0]])
    with pytest.raises(ingestion.Mixed), database.writing() as connection:
        ingestion.add_spans(connection, [new[0], a_span(other.rollout_id, other.attempt_id)])
    with pytest.raises(NotFound, match="there is no attempt 'none'"), database.writing() as connection:
        ingestion.add_spans(connection, [a_span(one.rollout_id, one.attempt_id), a_span(one.rollout_id, "none")])

    numbers = [None if each is None else each.sequence_id for each in stored]
    assert numbers == [7, 1, 1]
    assert again is None
    with database.reading() as connection:
        found = spans.outlines(connection, one.rollout_id, 10, 1_000)
    assert [row.sequence_id for row in found] == [1, 7]
