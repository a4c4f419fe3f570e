"""Tests of a rollout's revision and of what has changed since: calls, spans and breaks count, signs of life do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentlightning.rollout_records import Span
from agentlightning.sender import Progress, Sender
from agentlightning.store import Store, changes, open_database, open_store
from agentlightning.store.completeness import endings
from agentlightning.store.database import Database
from tests.common.generations import generation
from tests.store.conftest import EVERY_KIND, back_to_version, new_store_of

pytestmark = pytest.mark.tier("check")


@pytest.fixture(scope="session", params=EVERY_KIND[:2])
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def revision(database: Database, rollout_id: str) -> str:
    with database.reading() as connection:
        return changes.revision_of(connection, rollout_id)


def test_revision_of_a_rollout_changes_with_it_alone(store: Store, database: Database) -> None:
    one, other = store.start_rollout(1), store.start_rollout(2)
    before, of_other = revision(database, one.rollout_id), revision(database, other.rollout_id)
    found = {before}

    store.add([generation(1, rollout_id=one.rollout_id)])
    found.add(revision(database, one.rollout_id))
    store.add_span(Span("a span", one.rollout_id, one.attempt.attempt_id if one.attempt else None))
    found.add(revision(database, one.rollout_id))
    store.update_rollout(one.rollout_id, status="failed")
    found.add(revision(database, one.rollout_id))

    assert len(found) == 4
    assert revision(database, other.rollout_id) == of_other


def test_signs_of_life_leave_the_revision_and_changes_of_an_attempt_do_not(store: Store, database: Database) -> None:
    rollout = store.enqueue_rollout({"n": 1})
    seen = [revision(database, rollout.rollout_id)]
    taken = store.dequeue_rollout(worker_id="w")
    assert taken is not None
    assert taken.attempt is not None
    seen.append(revision(database, rollout.rollout_id))
    store.update_attempt(rollout.rollout_id, taken.attempt.attempt_id, metadata={"a": 1})
    seen.append(revision(database, rollout.rollout_id))
    assert len({*seen}) == len(seen)

    sender = Sender(host="h", pid=1, started_at=1, version="1")
    store.register_sender(sender)
    store.report_progress(sender.id, Progress(watermark=time.time_ns()))
    store.update_worker("w", {"load": 1})
    assert revision(database, rollout.rollout_id) == seen[-1]


def test_rollouts_that_changed_since_are_found_whatever_commits_first(store: Store, database: Database) -> None:
    one, other, third = (store.enqueue_rollout(n).rollout_id for n in range(3))
    with database.reading() as connection:
        before = changes.now_at(connection)
    store.update_rollout(one, status="failed")
    store.update_rollout(other, status="running")

    with database.reading() as connection:
        found = changes.changed_rollouts(connection, before)

    assert found[one][0] == "failed"
    assert found[other] == ("running", None)
    assert third not in found


def test_wait_reads_changes_from_an_index_alone(store: Store, database: Database, url: str) -> None:
    if "postgresql" in url:
        pytest.skip("the plan of a query on a few rows is another one there")
    ids = [store.enqueue_rollout("long " * 10_000).rollout_id for _ in range(3)]
    with database.reading() as connection:
        before = endings(connection, ids, recorded=False)
    store.update_rollout(ids[1], status="succeeded")
    statements: list[str] = []

    with database.reading() as connection:
        driver: Any = connection.connection.driver_connection
        driver.set_trace_callback(statements.append)
        found = endings(connection, ids, recorded=False, before=before)
        driver.set_trace_callback(None)
        plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}").all() for each in statements]

    assert (found.ended, found.are_all) == ([ids[1]], False)
    details = [row.detail for plan in plans for row in plan if "rollouts" in row.detail]
    assert details
    assert all("COVERING INDEX rollouts_by_change" in each for each in details), details


def test_wait_sees_that_a_rollout_was_deleted(store: Store, database: Database) -> None:
    gone, stays = (store.enqueue_rollout(n).rollout_id for n in range(2))
    store.update_rollout(gone, status="failed")
    with database.reading() as connection:
        before = endings(connection, [gone, stays], recorded=False)
    store.delete_rollouts([gone])

    with database.reading() as connection:
        found = endings(connection, [gone, stays], recorded=False, before=before)

    assert found.ended == []
    assert {*found.states} == {stays}


def test_transaction_that_commits_late_is_not_missed(store: Store, database: Database, url: str) -> None:
    if "postgresql" not in url:
        pytest.skip("a file has one writer at a time")
    rollout_id = store.enqueue_rollout(1).rollout_id
    with closing(open_database(url)) as late:
        with late.writing() as slow:
            slow.exec_driver_sql(
                "UPDATE rollouts SET status = 'failed', changed = pg_current_xact_id()::text::bigint "
                "WHERE rollout_id = %s",
                (rollout_id,),
            )
            store.enqueue_rollout(2)
            seen = revision(database, rollout_id)
            with database.reading() as connection:
                before = changes.now_at(connection)
        with database.reading() as connection:
            assert changes.changed_rollouts(connection, before)[rollout_id][0] == "failed"
        assert revision(database, rollout_id) != seen


def test_store_of_version_5_is_migrated(store: Store, url: str) -> None:
    rollout_id = store.enqueue_rollout(1).rollout_id
    with closing(open_database(url)) as database, database.writing() as connection:
        for statement in back_to_version(5, url):
            connection.exec_driver_sql(statement)

    with open_store(url) as migrated, closing(open_database(url)) as database:
        before = revision(database, rollout_id)
        assert migrated.dequeue_rollouts(1)[0].rollout_id == rollout_id
        assert revision(database, rollout_id) != before
