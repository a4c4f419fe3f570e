"""Tests of the list of all rollouts: those of the queue, and those that only calls name."""

from __future__ import annotations

from array import array
from contextlib import closing
from typing import Any, get_args

import pytest
from sqlalchemy import select, update

from agentlightning.generation import Choice, Generation
from agentlightning.rollout_records import NewRollout
from agentlightning.store import lifecycle, open_database, open_store, rollout_list, spans, summaries, tables
from agentlightning.store.database import Database
from agentlightning.store.rollout_list import Column, ListPage, ListQuery, duration_of
from agentlightning.store.summaries import Summary
from tests.common.generations import HOSTILE, SECOND, START, generation
from tests.store.conftest import back_to_version
from tests.store.test_triplets import of_call, of_reward

pytestmark = pytest.mark.tier("check")

HOUR = 3600.0
NOW = START / SECOND + HOUR


def call(number: int, rollout_id: str | None, **fields: Any) -> Generation:
    """Make a call with three ids in its prompt and five in its two choices."""
    choices = [Choice(token_ids=array("i", [1, 2])), Choice(index=1, token_ids=array("i", [3, 4, 5]))]
    usual: dict[str, Any] = {"prompt_token_ids": array("i", [7, 8, 9]), "choices": choices, "status": "finished"}
    return generation(number, **usual | fields, rollout_id=rollout_id)


def page_of(database: Database, **wanted: Any) -> ListPage:
    """Read a page of the list, as somebody sees it who looks now."""
    assert summaries.refresh(database)
    with database.reading() as connection:
        return rollout_list.page(connection, ListQuery(now=NOW, **wanted))


def rows_of(database: Database, **wanted: Any) -> list[Summary]:
    return page_of(database, **wanted).rollouts


def test_overview_of_a_queued_rollout_has_its_status_and_calls(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout("a task"), None)
        waiting = lifecycle.enqueue(connection, [NewRollout("another")])[0]
        spans.add(connection, [of_reward(1, 0.5, rollout_id=rollout_id), of_reward(2, -1.0, rollout_id=rollout_id)])
    with open_store(url) as store:
        store.add([call(1, rollout_id), call(2, rollout_id, status="aborted"), call(3, None), call(4, "another one")])
    found = {each.rollout_id: each for each in rows_of(database)}

    assert found.keys() == {rollout_id, waiting, "another one"}
    started = found[rollout_id]
    assert (started.status, started.attempts, started.ended) == ("preparing", 1, None)
    assert (started.calls, started.finished, started.prompt_tokens, started.output_tokens) == (2, 1, 6, 10)
    assert started.reward == -1.0
    assert (found[waiting].status, found[waiting].calls, found[waiting].reward) == ("queuing", 0, None)


def test_overview_of_a_recorded_rollout_lasts_from_its_first_to_its_last_call(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(number, "r", finished_at=START + number * SECOND) for number in (5, 2, 9)])

    [found] = rows_of(database)
    assert (found.rollout_id, found.status, found.attempts, found.calls, found.finished) == ("r", "recorded", 0, 3, 3)
    assert (found.prompt_tokens, found.output_tokens, found.reward, found.breaks, found.queued) == (9, 15, *[None] * 3)
    # `call` starts half a second before it ends.
    assert (found.started, duration_of(found, NOW), found.latency) == (START / SECOND + 1.5, 7.5, 0.5)
    assert found.ended == START / SECOND + 9


def test_unassigned_call_counts_for_the_rollout_whose_span_names_its_answer(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        # Some instrumentations make two spans of one call.
        spans.add(connection, [of_call(number, 7, rollout_id=rollout_id) for number in (1, 2)])
    with open_store(url) as store:
        store.add([call(7, None, response_id="answer-7"), call(8, None, response_id="another"), call(9, rollout_id)])
    [found] = rows_of(database)

    assert (found.calls, found.finished, found.prompt_tokens, found.output_tokens) == (2, 2, 6, 10)


def test_duration_of_an_unfinished_rollout_lasts_until_now(database: Database) -> None:
    with database.writing() as connection:
        lifecycle.start(connection, NewRollout(1), None)
    found = rows_of(database)[0]
    assert found.started is not None
    later = NOW * 2

    assert duration_of(found, later) == pytest.approx(later - found.started)


def test_rollout_that_waits_has_not_started(database: Database) -> None:
    with database.writing() as connection:
        [rollout_id] = lifecycle.enqueue(connection, [NewRollout(1)])
    [waiting] = rows_of(database)
    with database.writing() as connection:
        lifecycle.dequeue(connection, 1, None)
        connection.execute(update(tables.rollouts).values(start_time=10.0))
        connection.execute(update(tables.attempts).values(start_time=70.0, end_time=75.0))
        connection.execute(update(tables.rollouts).values(end_time=75.0))
    [ended] = rows_of(database)

    assert (waiting.started, waiting.attempt_started, duration_of(waiting, NOW), waiting.ended) == (None,) * 4
    assert waiting.queued is not None
    assert (ended.rollout_id, ended.queued, ended.started, duration_of(ended, NOW)) == (rollout_id, 10.0, 70.0, 5.0)


def test_retried_rollout_started_with_its_first_attempt(url: str, database: Database) -> None:
    start_again_after_failure(url)
    with database.writing() as connection:
        for sequence_id in (1, 2):
            of_attempt = tables.attempts.c.sequence_id == sequence_id
            connection.execute(update(tables.attempts).where(of_attempt).values(start_time=10.0 * sequence_id))

    assert [(each.started, each.attempt_started) for each in rows_of(database)] == [(10.0, 20.0)]


@pytest.fixture
def many(url: str, database: Database) -> list[str]:
    """Record fifty rollouts, each with one call more than the one before it; every third has a reward."""
    names = [f"rollout-{number:02}" for number in range(50)]
    calls = [call(100 * number + place, name) for number, name in enumerate(names) for place in range(number + 1)]
    with open_store(url) as store:
        store.add(calls)
    with database.writing() as connection:
        rewards = [of_reward(number, float(number), rollout_id=names[number]) for number in range(0, 50, 3)]
        spans.add(connection, rewards)
    return names


@pytest.mark.tier("test")
def test_pages_in_any_order_have_each_rollout_once(database: Database, many: list[str]) -> None:
    for column in get_args(Column):
        for descending in (True, False):
            wanted = {"sort_by": column, "descending": descending, "limit": 7}
            pages = [rows_of(database, **wanted, offset=offset) for offset in range(0, 50, 7)]
            assert sorted(each.rollout_id for page in pages for each in page) == many, column


def test_reward_that_arrives_late_does_not_replace_one_given_after_it(database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout("a task"), None)
        spans.add(connection, [of_reward(1, 1.0, rollout_id=rollout_id, at=20.0)])
        spans.add(connection, [of_reward(2, 0.25, rollout_id=rollout_id, at=10.0)])

    assert [each.reward for each in rows_of(database)] == [1.0]


def test_sort_by_reward_puts_rollouts_without_one_last_in_both_orders(database: Database, many: list[str]) -> None:
    best, worst = (
        [each.rollout_id for each in rows_of(database, sort_by="reward", descending=descending, limit=2)]
        for descending in (True, False)
    )

    assert best == ["rollout-48", "rollout-45"]
    assert worst == ["rollout-00", "rollout-03"]
    assert rows_of(database, sort_by="reward", descending=False)[-1].reward is None


def test_sort_by_calls_puts_the_most_first(database: Database, many: list[str]) -> None:
    found = rows_of(database, sort_by="calls", limit=3)

    assert [(each.rollout_id, each.calls) for each in found] == [
        ("rollout-49", 50),
        ("rollout-48", 49),
        ("rollout-47", 48),
    ]


def test_search_finds_ids_and_inputs_ignoring_case(database: Database, many: list[str]) -> None:
    with database.writing() as connection:
        lifecycle.enqueue(connection, [NewRollout({"question": "What is 100 %_ of it?"})])

    assert [each.rollout_id for each in rows_of(database, search="ROLLOUT-1", sort_by="rollout", descending=False)] == [
        f"rollout-1{digit}" for digit in range(10)
    ]
    assert [each.status for each in rows_of(database, search="what is 100")] == ["queuing"]
    # % and _ are no wildcards.
    assert len(rows_of(database, search="100 %_")) == 1
    assert rows_of(database, search="1%0") == []


def test_filter_by_status_takes_those_of_the_queue_and_recorded(database: Database, many: list[str]) -> None:
    with database.writing() as connection:
        lifecycle.enqueue(connection, [NewRollout(1)])

    assert [each.status for each in rows_of(database, names={"status": "queuing"})] == ["queuing"]
    assert len(rows_of(database, names={"status": "recorded"})) == 50
    assert rows_of(database, names={"status": "failed"}) == []


def test_page_has_the_total_number_of_rollouts(database: Database, many: list[str]) -> None:
    first, total, _ = page_of(database, search="rollout-1", limit=3)
    behind, all_of_them, _ = page_of(database, limit=3, offset=60)

    assert (len(first), total) == (3, 10)
    assert (behind, all_of_them) == ([], 50)


def test_overview_counts_unassigned_calls(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(1, None), call(2, "r"), call(3, None)])

    assert page_of(database).unassigned_calls == 2


def test_overview_has_rollouts_with_hostile_ids(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(number, rollout_id) for number, rollout_id in enumerate(HOSTILE.values())])

    assert {each.rollout_id for each in rows_of(database)} == set(HOSTILE.values())


def start_again_after_failure(url: str) -> str:
    """Create a rollout that has failed and whose next attempt is running."""
    with closing(open_database(url)) as database, database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"})
        lifecycle.start_attempt(connection, rollout_id, None)
    return rollout_id


def test_rollout_that_runs_again_has_not_ended(url: str, database: Database) -> None:
    rollout_id = start_again_after_failure(url)

    [found] = rows_of(database)
    assert (found.rollout_id, found.status, found.ended) == (rollout_id, "preparing", None)
    assert found.started is not None
    assert duration_of(found, NOW) == pytest.approx(max(NOW - found.started, 0))
    with database.writing() as connection:
        lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"})
    assert [each.ended is None for each in rows_of(database)] == [False]
    with database.writing() as connection:
        lifecycle.update_rollout(connection, rollout_id, {"status": "queuing"})
    assert [each.ended for each in rows_of(database)] == [None]


def test_attempt_that_runs_again_has_no_end_time(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        ended = lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"}).end_time
        again = lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "running"}).end_time

    assert (ended is None, again) == (False, None)


def test_migration_from_version_1_clears_stale_end_times(url: str) -> None:
    """Version 1 left the former end time on rollouts that ran again, and did not record who numbered a span."""
    running = start_again_after_failure(url)
    with closing(open_database(url)) as database, database.writing() as connection:
        ended = lifecycle.start(connection, NewRollout(2), None)
        lifecycle.update_attempt(connection, ended, "latest", {"status": "succeeded"})
        spans.add(connection, [of_reward(1, 0.5, rollout_id=running)])
        for statement in (
            *back_to_version(2, url),
            "UPDATE rollouts SET end_time = 7",
            "UPDATE attempts SET end_time = 7",
            "ALTER TABLE spans DROP COLUMN is_numbered",
            "ALTER TABLE spans DROP COLUMN common_key",
            "DROP TABLE probes",
            "PRAGMA user_version = 1" if "postgresql" not in url else "UPDATE version SET version = 1",
        ):
            connection.exec_driver_sql(statement)

    with closing(open_database(url)) as database:
        assert {each.rollout_id: each.ended for each in rows_of(database)} == {running: None, ended: 7}
        with database.reading() as connection:
            attempts = connection.execute(select(tables.attempts.c.status, tables.attempts.c.end_time)).all()
            assert {status: end_time for status, end_time in attempts if status != "failed"} == {
                "preparing": None,
                "succeeded": 7,
            }
        with database.writing() as connection:
            spans.add(connection, [of_reward(2, 0.75, rollout_id=running)])
        assert {each.rollout_id: each.reward for each in rows_of(database)}[running] == 0.75
