"""All rollouts at a glance: those of the queue and those that only calls name, with what became of them."""

from __future__ import annotations

from array import array
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import select

from agentlightning.generation import Choice, Generation
from agentlightning.rollout import NewRollout
from agentlightning.store import lifecycle, open_database, open_store, overview, spans, tables
from agentlightning.store.database import Database
from agentlightning.store.overview import COLUMNS, Overview, OverviewQuery
from tests.common.generations import HOSTILE, SECOND, START, generation
from tests.store.test_triplets import of_call, of_reward

pytestmark = pytest.mark.tier("check")

HOUR = 3600.0
NOW = START / SECOND + HOUR


def call(number: int, rollout_id: str | None, **fields: Any) -> Generation:
    """Three ids in and, in two choices, five out."""
    choices = [Choice(token_ids=array("i", [1, 2])), Choice(index=1, token_ids=array("i", [3, 4, 5]))]
    usual: dict[str, Any] = {"prompt_token_ids": array("i", [7, 8, 9]), "choices": choices, "status": "finished"}
    return generation(number, **usual | fields, rollout_id=rollout_id)


def of_all(database: Database, **asked: Any) -> list[Overview]:
    with database.reading() as connection:
        return overview.page(connection, OverviewQuery(now=NOW, **asked)).rollouts


def test_a_rollout_of_the_queue_has_its_status_and_its_calls(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout("a task"), None)
        waiting = lifecycle.enqueue(connection, [NewRollout("another")])[0]
        spans.add(connection, [of_reward(1, 0.5, rollout_id=rollout_id), of_reward(2, -1.0, rollout_id=rollout_id)])
    with open_store(url) as store:
        store.add([call(1, rollout_id), call(2, rollout_id, status="aborted"), call(3, None), call(4, "another one")])
    found = {each.rollout_id: each for each in of_all(database)}

    assert found.keys() == {rollout_id, waiting, "another one"}
    started = found[rollout_id]
    assert (started.status, started.attempts, started.ended) == ("preparing", 1, False)
    assert (started.calls, started.finished, started.prompt_tokens, started.output_tokens) == (2, 1, 6, 10)
    assert started.reward == -1.0
    assert (found[waiting].status, found[waiting].calls, found[waiting].reward) == ("queuing", 0, None)


def test_a_rollout_that_only_calls_name_lasts_from_the_first_to_the_last(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(number, "r", finished_at=START + number * SECOND) for number in (5, 2, 9)])

    assert of_all(database) == [
        Overview("r", "recorded", 0, 3, 3, 9, 15, None, START / SECOND + 2, 7.0, True),
    ]


def test_a_call_that_names_no_rollout_is_of_the_one_whose_span_names_its_answer(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        # Two spans are about one call, as some instrumentations have it.
        spans.add(connection, [of_call(number, 7, rollout_id=rollout_id) for number in (1, 2)])
    with open_store(url) as store:
        store.add([call(7, None, response_id="answer-7"), call(8, None, response_id="another"), call(9, rollout_id)])
    [found] = of_all(database)

    assert (found.calls, found.finished, found.prompt_tokens, found.output_tokens) == (2, 2, 6, 10)


def test_a_rollout_that_has_not_ended_lasts_until_now(database: Database) -> None:
    with database.writing() as connection:
        lifecycle.enqueue(connection, [NewRollout(1)])
    found = of_all(database)[0]
    later = NOW * 2

    with database.reading() as connection:
        assert overview.page(connection, OverviewQuery(now=later)).rollouts[0].duration == pytest.approx(
            later - found.started
        )


@pytest.fixture
def many(url: str, database: Database) -> list[str]:
    """Fifty that calls name, each with one call more than the one before it; every third has a reward."""
    names = [f"rollout-{number:02}" for number in range(50)]
    calls = [call(100 * number + place, name) for number, name in enumerate(names) for place in range(number + 1)]
    with open_store(url) as store:
        store.add(calls)
    with database.writing() as connection:
        rewards = [of_reward(number, float(number), rollout_id=names[number]) for number in range(0, 50, 3)]
        spans.add(connection, rewards)
    return names


def test_pages_have_each_rollout_once_in_every_order(database: Database, many: list[str]) -> None:
    for column in COLUMNS:
        for descending in (True, False):
            asked = {"sort_by": column, "descending": descending, "limit": 7}
            pages = [of_all(database, **asked, offset=offset) for offset in range(0, 50, 7)]
            assert sorted(each.rollout_id for page in pages for each in page) == many, column


def test_what_has_no_reward_comes_last_in_both_orders(database: Database, many: list[str]) -> None:
    best, worst = (
        [each.rollout_id for each in of_all(database, sort_by="reward", descending=descending, limit=2)]
        for descending in (True, False)
    )

    assert best == ["rollout-48", "rollout-45"]
    assert worst == ["rollout-00", "rollout-03"]
    assert of_all(database, sort_by="reward", descending=False)[-1].reward is None


def test_the_most_calls_come_first(database: Database, many: list[str]) -> None:
    found = of_all(database, sort_by="calls", limit=3)

    assert [(each.rollout_id, each.calls) for each in found] == [
        ("rollout-49", 50),
        ("rollout-48", 49),
        ("rollout-47", 48),
    ]


def test_a_search_is_in_ids_and_inputs_and_tells_no_letters_apart(database: Database, many: list[str]) -> None:
    with database.writing() as connection:
        lifecycle.enqueue(connection, [NewRollout({"question": "What is 100 %_ of it?"})])

    assert [each.rollout_id for each in of_all(database, search="ROLLOUT-1", sort_by="rollout", descending=False)] == [
        f"rollout-1{digit}" for digit in range(10)
    ]
    assert [each.status for each in of_all(database, search="what is 100")] == ["queuing"]
    # Of what a pattern is made of, each is itself.
    assert len(of_all(database, search="100 %_")) == 1
    assert of_all(database, search="1%0") == []


def test_a_status_is_one_of_the_queue_or_of_those_that_it_has_not(database: Database, many: list[str]) -> None:
    with database.writing() as connection:
        lifecycle.enqueue(connection, [NewRollout(1)])

    assert [each.status for each in of_all(database, status="queuing")] == ["queuing"]
    assert len(of_all(database, status="recorded")) == 50
    assert of_all(database, status="failed") == []


def test_how_many_there_are_is_told_with_each_page(database: Database, many: list[str]) -> None:
    with database.reading() as connection:
        first, total, _ = overview.page(connection, OverviewQuery(now=NOW, search="rollout-1", limit=3))
        behind, none, _ = overview.page(connection, OverviewQuery(now=NOW, limit=3, offset=60))

    assert (len(first), total) == (3, 10)
    assert (behind, none) == ([], 0)


def test_calls_that_name_no_rollout_are_counted(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(1, None), call(2, "r"), call(3, None)])

    with database.reading() as connection:
        assert overview.page(connection, OverviewQuery(now=NOW)).unassigned_calls == 2


def test_whatever_an_id_is_it_is_there(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([call(number, rollout_id) for number, rollout_id in enumerate(HOSTILE.values())])

    assert {each.rollout_id for each in of_all(database)} == set(HOSTILE.values())


def is_running_since_it_has_failed(url: str) -> str:
    """A rollout that has failed, and whose next attempt runs."""
    with closing(open_database(url)) as database, database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"})
        lifecycle.start_attempt(connection, rollout_id, None)
    return rollout_id


def test_a_rollout_that_runs_again_has_not_ended(url: str, database: Database) -> None:
    rollout_id = is_running_since_it_has_failed(url)

    [found] = of_all(database)
    assert (found.rollout_id, found.status, found.ended) == (rollout_id, "preparing", False)
    assert found.duration == pytest.approx(max(NOW - found.started, 0))
    with database.writing() as connection:
        lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"})
    assert [each.ended for each in of_all(database)] == [True]
    with database.writing() as connection:
        lifecycle.update_rollout(connection, rollout_id, {"status": "queuing"})
    assert [each.ended for each in of_all(database)] == [False]


def test_an_attempt_that_runs_again_has_not_ended(url: str, database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout(1), None)
        ended = lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "failed"}).end_time
        again = lifecycle.update_attempt(connection, rollout_id, "latest", {"status": "running"}).end_time

    assert (ended is None, again) == (False, None)


def test_rollouts_of_an_older_store_that_run_again_have_not_ended(url: str) -> None:
    """Version 1 left them the time at which they had ended before, and knew nothing of who numbers spans."""
    running = is_running_since_it_has_failed(url)
    with closing(open_database(url)) as database, database.writing() as connection:
        ended = lifecycle.start(connection, NewRollout(2), None)
        lifecycle.update_attempt(connection, ended, "latest", {"status": "succeeded"})
        spans.add(connection, [of_reward(1, 0.5, rollout_id=running)])
        for statement in (
            "UPDATE rollouts SET end_time = 7",
            "UPDATE attempts SET end_time = 7",
            "ALTER TABLE spans DROP COLUMN is_numbered",
            "ALTER TABLE spans DROP COLUMN common_key",
            "DROP TABLE probes",
            "PRAGMA user_version = 1" if "postgresql" not in url else "UPDATE version SET version = 1",
        ):
            connection.exec_driver_sql(statement)

    with closing(open_database(url)) as database:
        assert {each.rollout_id: each.ended for each in of_all(database)} == {running: False, ended: True}
        with database.reading() as connection:
            attempts = connection.execute(select(tables.attempts.c.status, tables.attempts.c.end_time)).all()
            assert {status: end_time for status, end_time in attempts if status != "failed"} == {
                "preparing": None,
                "succeeded": 7,
            }
        with database.writing() as connection:
            spans.add(connection, [of_reward(2, 0.75, rollout_id=running)])
        assert {each.rollout_id: each.reward for each in of_all(database)}[running] == 0.75
