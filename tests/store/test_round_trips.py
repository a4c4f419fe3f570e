"""Tests of how often a call waits for PostgreSQL: counted exactly, from the messages of the connection."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest
from psycopg.pq import Trace
from sqlalchemy import Connection

from agentlightning.rollout_records import NewRollout, Span, with_ids
from agentlightning.store import ingestion, lifecycle, open_database, spans
from agentlightning.store.database import Database
from agentlightning.store.lifecycle import AttemptChange, Dequeue, Start
from tests.common.postgresql import PostgresServer

MANY = 32
# psycopg prepares a statement when it is executed the sixth time on a connection.
UNTIL_PREPARED = 8


class Traffic:
    """The messages of a connection.

    Attributes:
        round_trips: how often something was sent and waited for.
        prepared: the number of statements that the server was told anew.
    """

    round_trips = prepared = 0


@contextmanager
def watched(database: Database) -> Iterator[Traffic]:
    """Count what goes over the only connection of a database."""
    with database.reading() as connection:
        driver: Any = connection.connection.driver_connection
    seen = Traffic()
    with tempfile.TemporaryFile("w+") as file:
        driver.pgconn.trace(file.fileno())
        driver.pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS)
        try:
            yield seen
        finally:
            driver.pgconn.untrace()
        file.seek(0)
        before = ""
        # The text of a statement may have several lines.
        for direction, message in re.findall(r"^([FB])\t\d+\t(\w+)", file.read(), re.MULTILINE):
            seen.round_trips += direction == "B" and before == "F"
            seen.prepared += message == "Parse"
            before = direction


@pytest.fixture
def database(postgresql: PostgresServer) -> Iterator[Database]:
    with closing(open_database(postgresql.new_database())) as database:
        yield database


def started(connection: Connection, how_many: int) -> list[Any]:
    return lifecycle.start_all(connection, [Start(NewRollout(n), f"w-{n}") for n in range(how_many)])


def a_span(row: Any) -> spans.NewSpan:
    return spans.new_span(with_ids(Span("a span", row.rollout_id, row.attempt_id, attributes={}).as_dict()))


def start(connection: Connection, rows: Sequence[Any]) -> None:
    started(connection, len(rows))


def dequeue(connection: Connection, rows: Sequence[Any]) -> None:
    taken = lifecycle.dequeue_all(connection, [Dequeue(1, f"w-{n}") for n in range(len(rows))])
    assert all(len(each) == 1 for each in taken)


def finish(connection: Connection, rows: Sequence[Any]) -> None:
    changes = [AttemptChange(row.rollout_id, row.attempt_id, {"status": "succeeded"}) for row in rows]
    assert len(lifecycle.update_attempts(connection, changes)) == len(rows)


def add_spans(connection: Connection, rows: Sequence[Any]) -> None:
    assert all(ingestion.add_spans(connection, [a_span(row) for row in rows]))


def beat(connection: Connection, rows: Sequence[Any]) -> None:
    assert all(lifecycle.heartbeats(connection, [(row.rollout_id, row.attempt_id) for row in rows]))


@pytest.mark.parametrize(("write", "round_trips"), [(start, 5), (dequeue, 4), (finish, 5), (add_spans, 9), (beat, 5)])
@pytest.mark.parametrize("how_many", [1, MANY])
def test_call_takes_as_many_round_trips_for_many_as_for_one(
    database: Database, write: Callable[[Connection, Sequence[Any]], None], round_trips: int, how_many: int
) -> None:
    def once() -> Traffic:
        with database.writing() as connection:
            lifecycle.enqueue(connection, [NewRollout(n) for n in range(how_many)])
            rows = started(connection, how_many)
        with watched(database) as seen, database.writing() as connection:
            write(connection, rows)
        return seen

    for _ in range(UNTIL_PREPARED):
        once()
    seen = once()

    assert (seen.round_trips, seen.prepared) == (round_trips, 0)
