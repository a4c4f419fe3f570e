"""Watermarks in every store: waits until calls are written, whatever the clocks say, and what a rollout lacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, select, update

import agentlightning as agl
from agentlightning.errors import NotFound
from agentlightning.generation import new_id
from agentlightning.rollout_records import RolloutConfig, Span
from agentlightning.sender import LostCalls, Progress, Sender, StoreTime, UnfinishedCalls
from agentlightning.store import open_database, tables, watermarks
from agentlightning.store.completeness import FELL_SILENT, SECONDS_A_SILENT_SERVER_COUNTS
from agentlightning.store.database import Database
from agentlightning.store.rows import uuid_bytes
from tests.common.generations import HOSTILE, generation
from tests.server.process import StoreServer
from tests.store.conftest import EVERY_KIND, back_to_version, new_store_of

pytestmark = pytest.mark.tier("check")

SECOND = 10**9
HOUR = 3600 * SECOND
MINUTE_IN_SECONDS = 60


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


@pytest.fixture
def database(url: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """Open the database under the store, also under an `agl store`."""
    server: StoreServer | None = request.getfixturevalue("server") if url.startswith("http") else None
    with closing(open_database(url if server is None else str(server.path))) as found:
        yield found


class Process:
    """A process that records, with a clock of its own that is so many nanoseconds ahead."""

    def __init__(self, store: agl.Store, ahead: int = 0, host: str = "gpu-1", pid: int = 7) -> None:
        self.sender = Sender(host=host, pid=pid, started_at=1, version="0.1.0")
        self._store = store
        self._ahead = ahead
        self._store_time: StoreTime | None = None
        store.register_sender(self.sender)

    def now(self) -> int:
        return time.time_ns() + self._ahead

    def report(self, watermark: int | None = None, **fields: Any) -> None:
        told = Progress(watermark=watermark or self.now(), store_time=self._store_time, **fields)
        at = self._store.report_progress(self.sender.id, told)
        self._store_time = StoreTime(at, self.now())

    def report_all(self, **fields: Any) -> None:
        """Report twice: with the first report it learns the store's time."""
        self.report(**fields)
        self.report(**fields)


def started(store: agl.Store, **options: Any) -> agl.Rollout:
    return store.start_rollout({"question": "Paris?"}, **options)


def ended(store: agl.Store) -> agl.Rollout:
    rollout = started(store)
    rollout.finish("succeeded")
    return rollout


def are_written(store: agl.Store, *rollouts: agl.Rollout) -> list[bool]:
    ids = [each.rollout_id for each in rollouts]
    found = {each.rollout_id for each in store.wait_for_rollouts(ids, timeout=0, recorded=True)}
    return [each in found for each in ids]


def let_time_pass(database: Database, sender: Sender, seconds: float) -> None:
    """Make all that a sender has told older."""
    table = tables.watermarks
    key = select(tables.senders.c.key).where(tables.senders.c.id == uuid_bytes(sender.id)).scalar_subquery()
    older = {
        name: table.c[name] - int(seconds * SECOND) for name in ("registered_at", "reported_at", "clock_difference")
    }
    with database.writing() as connection:
        connection.execute(update(table).where(table.c.sender_key == key).values(older))


@pytest.fixture
def runs_for_long(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store have run for longer than a sender may be silent."""
    with database.writing() as connection:
        connection.execute(update(tables.probes).values(written_at=0))
        if connection.dialect.name == "postgresql":
            # A test that begins its own server cannot wait for half a minute.
            monkeypatch.setattr(watermarks, "POSTGRESQL_STARTED", "SELECT 0::float8")


@pytest.mark.parametrize("ahead", [-HOUR, 0, HOUR])
def test_a_rollout_is_written_when_the_watermark_of_a_skewed_clock_has_passed_its_end(
    store: agl.Store, ahead: int
) -> None:
    process = Process(store, ahead)
    before = process.now()
    process.report_all()
    rollout = ended(store)

    assert are_written(store, rollout) == [False]
    process.report(before)
    assert are_written(store, rollout) == [False]
    process.report()
    process.report()
    assert are_written(store, rollout) == [True]


def test_a_watermark_counts_only_once_the_stores_time_is_known(store: agl.Store) -> None:
    process = Process(store, HOUR)
    rollout = ended(store)
    process.report()

    assert are_written(store, rollout) == [False]
    assert store.completeness(rollout.rollout_id).behind[0].seconds is None
    process.report()
    process.report()
    assert are_written(store, rollout) == [True]


def test_a_report_that_was_long_on_its_way_makes_no_watermark_too_late(store: agl.Store) -> None:
    process = Process(store)
    process.report_all()
    sent_at = process.now()
    # The rollout ends while the report is under way.
    rollout = ended(store)
    process.report(sent_at)

    assert are_written(store, rollout) == [False]


def test_an_answer_that_took_long_takes_no_watermark_back(store: agl.Store) -> None:
    process = Process(store)
    process.report_all()
    rollout = ended(store)
    process.report_all()
    assert are_written(store, rollout) == [True]

    at = store.report_progress(process.sender.id, Progress(watermark=process.now(), store_time=process._store_time))
    late = Progress(watermark=process.now(), store_time=StoreTime(at, process.now() + HOUR))
    store.report_progress(process.sender.id, late)

    assert are_written(store, rollout) == [True]


def test_a_store_whose_clock_is_set_back_waits_for_the_watermark(store: agl.Store, database: Database) -> None:
    process = Process(store)
    process.report_all()
    before = process.now()
    # The clock is set back by an hour: all that the store noted, and all that it answered, is an hour ahead now.
    let_time_pass(database, process.sender, -HOUR / SECOND)
    assert process._store_time is not None
    process._store_time = StoreTime(process._store_time.time + HOUR, process._store_time.received_at)
    rollout = ended(store)

    process.report(before)
    assert are_written(store, rollout) == [False]
    process.report(before)
    assert are_written(store, rollout) == [False]
    process.report()
    assert are_written(store, rollout) == [True]


def test_the_slowest_live_sender_is_waited_for(store: agl.Store) -> None:
    fast, slow = Process(store), Process(store, host="gpu-2", pid=8)
    slow.report_all()
    at = slow.now()
    rollout = ended(store)
    fast.report_all()
    slow.report(at)

    assert are_written(store, rollout) == [False]
    [behind] = store.completeness(rollout.rollout_id).behind
    assert (behind.sender_id, behind.host, behind.pid) == (slow.sender.id, "gpu-2", 8)
    assert behind.seconds is not None
    assert behind.seconds > 0
    slow.report()
    assert are_written(store, rollout) == [True]


def test_waiting_ends_when_the_watermark_passes(store: agl.Store) -> None:
    process = Process(store)
    process.report_all()
    rollout = ended(store)
    waiting = threading.Thread(target=lambda: store.wait_for_rollouts([rollout.rollout_id], recorded=True))
    waiting.start()
    assert waiting.is_alive()

    process.report_all()

    waiting.join(MINUTE_IN_SECONDS)
    assert not waiting.is_alive()
    assert store.completeness(rollout.rollout_id).complete


def test_only_rollouts_that_ended_before_the_watermark_are_returned(store: agl.Store) -> None:
    process = Process(store)
    process.report_all()
    early = ended(store)
    process.report_all()
    late, running = ended(store), started(store)

    assert are_written(store, early, late, running) == [True, False, False]
    found = store.wait_for_rollouts([early.rollout_id, late.rollout_id, running.rollout_id], timeout=0)
    assert {each.rollout_id for each in found} == {early.rollout_id, late.rollout_id}


def test_without_senders_nothing_is_waited_for(store: agl.Store) -> None:
    rollout = ended(store)

    assert are_written(store, rollout) == [True]
    assert store.completeness(rollout.rollout_id).complete
    assert store.completeness(rollout.rollout_id).reasons() == []


def test_a_sender_that_said_that_it_ends_is_not_waited_for(store: agl.Store) -> None:
    process = Process(store)
    process.report_all(has_ended=True)
    rollout = ended(store)

    assert are_written(store, rollout) == [True]
    assert store.completeness(rollout.rollout_id).complete


@pytest.mark.usefixtures("runs_for_long")
def test_calls_of_a_sender_that_fell_silent_are_missing_in_trajectories(store: agl.Store, database: Database) -> None:
    process = Process(store)
    store.add([generation(1, rollout_id=each, attempt_id="a") for each in ("r", "s")])
    process.report_all(under_way=[UnfinishedCalls("r", "a", 2)])

    def flags() -> list[list[str]]:
        return [[flag for flag in row.flags if flag == "missing_call"] for row in store.trajectories()]

    before = flags()
    let_time_pass(database, process.sender, watermarks.SECONDS_UNTIL_SILENT)

    assert before == [[], []]
    assert flags() == [["missing_call"], []]


@pytest.mark.usefixtures("runs_for_long")
def test_a_sender_that_fell_silent_is_not_waited_for_and_its_calls_are_lost_by_name(
    store: agl.Store, database: Database
) -> None:
    process, rollout, other = Process(store), started(store), started(store)
    process.report_all(under_way=[UnfinishedCalls(rollout.rollout_id, None, 2), UnfinishedCalls(None, None, 5)])
    rollout.finish("failed")
    other.finish("succeeded")
    assert are_written(store, rollout) == [False]
    assert [each.calls for each in store.completeness(rollout.rollout_id).under_way] == [2]

    let_time_pass(database, process.sender, watermarks.SECONDS_UNTIL_SILENT)

    assert are_written(store, rollout) == [True]
    found = store.completeness(rollout.rollout_id)
    assert not found.complete
    assert found.under_way == found.behind == []
    [lost] = found.lost
    assert (lost.sender_id, lost.calls, lost.reason) == (process.sender.id, 2, FELL_SILENT)
    # Of what it answered after its last word, nothing is known, so any rollout of that time may have lost calls.
    assert [each.sender_id for each in found.silent] == [process.sender.id]
    of_other = store.completeness(other.rollout_id)
    assert [each.sender_id for each in of_other.silent] == [process.sender.id]
    assert of_other.lost == []
    assert any("process 7 on gpu-1 fell silent" in each for each in of_other.reasons())


@pytest.mark.usefixtures("runs_for_long")
def test_a_rollout_before_or_after_the_life_of_a_silent_sender_is_complete(
    store: agl.Store, database: Database
) -> None:
    before = ended(store)
    process = Process(store)
    process.report_all()
    with database.writing() as connection:
        last = int(time.time() - 2 * SECONDS_A_SILENT_SERVER_COUNTS) * SECOND
        values = {"registered_at": last, "reported_at": last, "watermark": last, "clock_difference": 0}
        connection.execute(update(tables.watermarks).values(**values))
        connection.execute(update(tables.rollouts).values(start_time=last / SECOND - 2, end_time=last / SECOND - 1))
    after = ended(store)

    assert store.completeness(before.rollout_id).complete
    assert store.completeness(after.rollout_id).complete
    with database.writing() as connection:
        connection.execute(update(tables.rollouts).values(end_time=last / SECOND + 1))
    assert store.completeness(before.rollout_id).silent


@pytest.mark.usefixtures("runs_for_long")
def test_a_rollout_that_starts_after_a_sender_was_cut_off_may_have_lost_calls(
    store: agl.Store, database: Database
) -> None:
    process = Process(store)
    process.report_all()
    let_time_pass(database, process.sender, watermarks.SECONDS_UNTIL_SILENT + 1)
    rollout = ended(store)

    assert are_written(store, rollout) == [True]
    assert [each.sender_id for each in store.completeness(rollout.rollout_id).silent] == [process.sender.id]

    let_time_pass(database, process.sender, SECONDS_A_SILENT_SERVER_COUNTS)

    assert store.completeness(rollout.rollout_id).complete


@pytest.mark.usefixtures("runs_for_long")
def test_a_sender_that_speaks_again_is_waited_for_again(store: agl.Store, database: Database) -> None:
    process = Process(store)
    process.report_all()
    let_time_pass(database, process.sender, watermarks.SECONDS_UNTIL_SILENT + 1)
    rollout = ended(store)
    assert are_written(store, rollout) == [True]

    process.report(process.now() - SECOND)

    assert are_written(store, rollout) == [False]


def test_senders_that_were_live_when_the_store_stopped_are_waited_for(store: agl.Store, database: Database) -> None:
    crashed, live = Process(store), Process(store, pid=8)
    for each in (crashed, live):
        each.report_all()
    let_time_pass(database, crashed.sender, 10 * watermarks.SECONDS_UNTIL_SILENT)
    let_time_pass(database, live.sender, 5 * watermarks.SECONDS_UNTIL_SILENT)
    rollout = ended(store)

    # The store was away until now.
    database.write(watermarks.note_start)

    assert [each.pid for each in store.completeness(rollout.rollout_id).behind] == [8]
    assert are_written(store, rollout) == [False]


def test_calls_under_way_are_named_by_rollout_and_attempt(store: agl.Store) -> None:
    process, rollout = Process(store), started(store)
    assert rollout.attempt is not None
    attempt_id = rollout.attempt.attempt_id
    rollout.finish("succeeded")
    process.report_all(
        under_way=[
            UnfinishedCalls(rollout.rollout_id, attempt_id, 2),
            UnfinishedCalls(rollout.rollout_id, "another", 1),
            UnfinishedCalls("another", attempt_id, 7),
        ]
    )

    found = store.completeness(rollout.rollout_id)
    assert (found.complete, [each.calls for each in found.under_way]) == (False, [3])
    assert [each.calls for each in store.completeness(rollout.rollout_id, attempt_id).under_way] == [2]
    assert [each.calls for each in store.completeness(rollout.rollout_id, "latest").under_way] == [2]
    assert "process 7 on gpu-1 is still answering 3 calls" in found.reasons()
    # A wait is for what had ended.
    assert are_written(store, rollout) == [True]

    process.report_all()

    assert store.completeness(rollout.rollout_id).complete


def test_losses_are_named_by_rollout_each_once(store: agl.Store) -> None:
    process, rollout = Process(store), ended(store)
    lost = LostCalls(rollout_id=rollout.rollout_id, attempt_id=None, count=2, reason="queue full")
    other = LostCalls(rollout_id=None, attempt_id=None, count=9, reason="queue full")
    process.report_all(lost=[lost, other])

    found = store.completeness(rollout.rollout_id)

    assert not found.complete
    assert [(each.sender_id, each.calls, each.reason) for each in found.lost] == [(process.sender.id, 2, "queue full")]
    assert found.reasons() == ["process 7 on gpu-1 lost 2 calls: queue full"]


def test_a_span_that_names_an_answer_which_is_not_recorded_makes_a_rollout_incomplete(store: agl.Store) -> None:
    rollout = started(store)
    assert rollout.attempt is not None
    attempt_id = rollout.attempt.attempt_id
    store.add([generation(1, response_id="answer-1")])
    for answer in ("answer-1", "answer-2", "answer-2"):
        attributes = {"gen_ai.response.id": answer}
        store.add_span(Span("call", rollout.rollout_id, attempt_id, attributes=attributes))
    rollout.finish("succeeded")

    found = store.completeness(rollout.rollout_id, "latest")

    assert (found.complete, found.unrecorded) == (False, ["answer-2"])
    assert found.reasons() == ["a span names the answer 'answer-2', which is not recorded"]
    store.add([generation(2, response_id="answer-2")])
    assert store.completeness(rollout.rollout_id).complete


def test_a_rollout_that_has_not_ended_is_not_complete(store: agl.Store) -> None:
    rollout = started(store, config=RolloutConfig(max_attempts=2, retry_condition=["failed"]))
    assert rollout.attempt is not None
    first = rollout.attempt.attempt_id

    running = store.completeness(rollout.rollout_id)
    rollout.finish("failed")
    again = store.completeness(rollout.rollout_id)

    assert (running.complete, running.status, running.reasons()) == (
        False,
        "preparing",
        ["it has not ended: its status is preparing"],
    )
    assert (again.complete, again.status) == (False, "requeuing")
    # Its first attempt has.
    assert store.completeness(rollout.rollout_id, first).complete


@pytest.mark.parametrize("rollout_id", ["nobody", *HOSTILE.values()], ids=["unknown", *HOSTILE])
def test_a_rollout_that_the_queue_does_not_have_is_not_complete(store: agl.Store, rollout_id: str) -> None:
    for attempt_id in (None, "latest", rollout_id):
        found = store.completeness(rollout_id, attempt_id)

        assert (found.complete, found.status, found.ended) == (False, None, False)


def test_an_unregistered_sender_cannot_report(store: agl.Store) -> None:
    with pytest.raises(NotFound, match="not registered"):
        store.report_progress(new_id(), Progress(watermark=1))


def test_a_sender_registers_again_where_the_store_has_lost_it(store: agl.Store, database: Database) -> None:
    process = Process(store)
    with database.writing() as connection:
        for table in (tables.senders, tables.watermarks):
            connection.execute(table.delete())
    rollout = ended(store)

    try:
        process.report()
    except NotFound:
        store.register_sender(process.sender)
        process.report()

    assert are_written(store, rollout) == [False]


def test_tables_are_the_same_after_a_migration(url: str, database: Database) -> None:
    if url.startswith("http"):
        pytest.skip("a server's database is one of the other two")
    if "partitions" in url:
        pytest.skip("no store of version 2 has partitions")
    names = ("blocks", "generations", "watermarks", "lost_calls")
    schema = None if "postgresql" not in url else "agentlightning"

    def described() -> Any:
        with closing(open_database(url)) as opened, opened.reading() as connection:
            found = inspect(connection)
            return [
                (
                    # In any order: a migration adds columns at the end.
                    sorted(
                        (each["name"], str(each["type"]), each["nullable"]) for each in found.get_columns(name, schema)
                    ),
                    found.get_pk_constraint(name, schema)["constrained_columns"],
                    [each["column_names"] for each in found.get_unique_constraints(name, schema)],
                    [(each["name"], each["column_names"]) for each in found.get_indexes(name, schema)],
                )
                for name in names
            ]

    fresh = described()
    with database.writing() as connection:
        for statement in back_to_version(2, url):
            connection.exec_driver_sql(statement)

    assert described() == fresh
