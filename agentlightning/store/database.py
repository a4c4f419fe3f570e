"""The database under a store: its transactions, and what differs between SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, CursorResult, Dialect, Insert, LargeBinary, Table, insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from agentlightning.errors import StoreRefused, StoreUnavailable

__all__ = [
    "EARLIEST_DEADLINE",
    "STARTED",
    "Conflict",
    "Database",
    "NotCreated",
    "NotMigrated",
    "Start",
    "accept_to_read",
    "change",
    "earliest_deadline",
    "fetch",
    "found",
    "in_parts",
    "insert_if_new",
    "insert_rows",
    "insert_valid",
    "is_single_writer",
    "newer",
    "next_keys",
    "now",
    "pipelined",
    "run",
    "run_many",
    "savepoint",
    "transaction",
]

# Builds of SQLite before 3.32 take no more than 999 in a statement.
VARIABLES_AT_ONCE = 500
# How often a transaction is tried that runs into conflicts.
CONFLICTS = 5

T = TypeVar("T")


class Conflict(StoreUnavailable):
    """Write conflict, rolled back; retry immediately."""


class NotCreated(StoreUnavailable):
    """There is no store at this place yet: a writer would create it."""


class NotMigrated(StoreRefused):
    """An older version wrote the store: a writer would migrate it."""


class Database(ABC):
    """A database with the tables of this version. Safe for several threads, not across a fork.

    Whatever is done with its connections raises `StoreUnavailable`, `StoreRefused`, or `InvalidRecord` where a value is
    the reason.

    Attributes:
        is_read_only: True if it was opened for reading only; `writing` then raises `StoreRefused`.
    """

    is_read_only: bool

    @abstractmethod
    def __init__(self, place: str, read_only: bool, patience: float) -> None: ...

    @classmethod
    @abstractmethod
    def try_to_record(cls, place: str, patience: float) -> str:
        """See `agentlightning.store.try_to_record`."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """Open a read transaction: it sees the database as it is at its first query."""

    @abstractmethod
    def writing(self, *, alone: bool = False) -> AbstractContextManager[Connection]:
        """Open a write transaction: it is rolled back if the block raises.

        Args:
            alone: no other write transaction is open meanwhile, so that what nothing refers to may be deleted.
        """

    @abstractmethod
    def explanation(self, error: Exception) -> Exception | None:
        """Return the exception to raise for an error of the driver; None for any other error."""

    def tidy(self) -> None:
        """Release unused disk space, unless that would have to wait for other processes."""
        return

    @abstractmethod
    def size(self) -> int:
        """Return the number of bytes that the database takes on its disk."""

    @abstractmethod
    def shrink(self) -> Iterator[None]:
        """Return the space of deleted rows to the file system, as far as that is possible beside writers.

        It is done in steps, one for each value: none of them keeps writers waiting for long.
        """

    @abstractmethod
    def space_advice(self) -> str | None:
        """Return a sentence on the space that `shrink` cannot return; None where it returns all."""

    @abstractmethod
    def rewrite(self) -> None:
        """Write the whole database anew, without unused space. Keeps writers out until it is done."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections. Idempotent."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Translate the driver's errors into those of this package."""
        try:
            yield
        except Exception as error:
            meaning = self.explanation(error)
            if meaning is None:
                raise
            raise meaning from error

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a write transaction and return its result; on a conflict, run it again."""
        for _ in range(CONFLICTS - 1):
            with suppress(Conflict), self.writing() as connection:
                return work(connection)
        with self.writing() as connection:
            return work(connection)


def accept_to_read(name: str, version: int, current: int) -> None:
    """Accept the tables of the current version for reading.

    Args:
        name: the place of the database, as it may be shown.
        version: the version of its tables; 0 where there are none.
        current: the version that this package reads.

    Raises:
        NotCreated: there are no tables.
        NotMigrated: they are older: a reader changes nothing, so it cannot migrate them.
    """
    if version == 0:
        raise NotCreated(f"{name} has no store in it", "a server that records there, or `agl store`, creates it")
    if version < current:
        raise NotMigrated(
            f"{name} was written by an older agentlightning (schema {version}, this one reads {current})",
            f"run `agl migrate --store {name}`, or start a server that writes there",
        )


def newer(name: str, version: int, current: int) -> StoreRefused:
    """Make the error for tables that a newer version of this package has written."""
    return StoreRefused(
        f"{name} was written by a newer agentlightning (schema {version}, this one knows {current})",
        "upgrade agentlightning, or give another store",
    )


@contextmanager
def transaction(connection: Connection, begin: str | None) -> Iterator[None]:
    """Run the block in a transaction that `begin` opens; commit it, or roll it back if the block raises.

    Args:
        begin: None for a transaction that has begun.
    """
    try:
        if begin is not None:
            _command(connection, begin)
        yield
        _command(connection, "COMMIT")
    except BaseException:
        # SQLite has rolled it back itself if the disk is full, PostgreSQL if the connection is gone. Where it has not
        # begun, since its locks are taken, there is nothing to roll back in SQLite; in PostgreSQL there is.
        with suppress(SQLAlchemyError, sqlite3.Error):
            _command(connection, "ROLLBACK")
        raise


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Run the block in a part of the transaction that is rolled back alone if the block raises. May be nested."""
    _command(connection, "SAVEPOINT part")
    try:
        yield
    except BaseException:
        # Fails if the transaction itself is gone, since the disk is full or the connection lost: the block's error says
        # so.
        with suppress(SQLAlchemyError, sqlite3.Error):
            _command(connection, "ROLLBACK TO part")
            _command(connection, "RELEASE part")
        raise
    _command(connection, "RELEASE part")


def is_single_writer(connection: Connection) -> bool:
    """Tell whether no other process can write while this transaction does."""
    return connection.dialect.name == "sqlite"


@dataclass(frozen=True, slots=True)
class Start:
    """Answer to the message with which a transaction of a database that several hosts write to begins.

    Attributes:
        clock: the database's own, in seconds since the epoch.
        at: `time.monotonic()` when that had arrived.
        deadline: the earliest of all attempts; None where none has one.
    """

    clock: float
    at: float
    deadline: float | None


STARTED = "agl_started"
"""Key of the `Start` of a connection's transaction, in `Connection.info`."""
EARLIEST_DEADLINE = "SELECT min(deadline) FROM attempts WHERE deadline IS NOT NULL"


def now(connection: Connection) -> float:
    """Return the time in seconds since the epoch, by the one clock that all writers share.

    A database that several hosts write to has a clock of its own. It is read when a transaction begins, so that the
    time is never ahead of it: behind by the time that the answer took.
    """
    if is_single_writer(connection):
        return time.time()
    start: Start = connection.info[STARTED]
    return start.clock + time.monotonic() - start.at


def earliest_deadline(connection: Connection) -> float | None:
    """Return the earliest deadline of an attempt, as it was when the transaction began; None where none has one."""
    if is_single_writer(connection):
        return run(connection, EARLIEST_DEADLINE, ()).scalar()
    start: Start = connection.info[STARTED]
    return start.deadline


def next_keys(connection: Connection, table: Table, how_many: int) -> Sequence[int]:
    """Reserve unique, ascending numbers for the column `key` of new rows."""
    if is_single_writer(connection):
        [(last,)] = _driver(connection).execute(f"SELECT max(key) FROM {table.name}")
        return range((last or 0) + 1, (last or 0) + 1 + how_many)
    query = "SELECT nextval(%s::regclass) FROM generate_series(1, %s)"
    return connection.exec_driver_sql(query, (f"{table.name}_key_seq", how_many)).scalars().all()


def run(connection: Connection, statement: str, values: Sequence[Any]) -> CursorResult[Any]:
    """Execute a statement given as text, with a ? for each value.

    SQLAlchemy takes longer to build a statement than the database to answer it.
    """
    if not is_single_writer(connection):
        statement = statement.replace("?", "%s")
    return connection.exec_driver_sql(statement, tuple(values))


def run_many(connection: Connection, statement: str, values: Sequence[tuple[Any, ...]]) -> None:
    """Execute a statement given as text, with a ? for each value, once for each row of values, if there are any."""
    if not values:
        return
    if not is_single_writer(connection):
        statement = statement.replace("?", "%s")
    connection.exec_driver_sql(statement, values[0] if len(values) == 1 else [*values])


@contextmanager
def pipelined(connection: Connection) -> Iterator[None]:
    """Send the statements of the block, whose results are not read, without waiting for each of them."""
    if is_single_writer(connection):
        yield
        return
    # Where there is a PostgreSQL, there is its driver; libpq before 14 cannot do it.
    from psycopg import Pipeline

    driver: Any = connection.connection.driver_connection
    with driver.pipeline() if Pipeline.is_supported() else nullcontext():
        yield


def change(connection: Connection, statement: str, values: Sequence[Any]) -> int:
    """Execute a statement given as text, with a ? for each value; returns how many rows it has changed."""
    if is_single_writer(connection):
        return _driver(connection).execute(statement, values).rowcount
    return run(connection, statement, values).rowcount


def fetch(connection: Connection, query: str, values: Sequence[Any]) -> Sequence[Any]:
    """Read the rows of a query given as text, with a ? for each value."""
    return run(connection, query, values).all()


def found(
    connection: Connection, table: Table, columns: Sequence[str], by: str, values: Sequence[Any]
) -> Iterable[Sequence[Any]]:
    """Select columns of the rows whose column `by` has one of the values: at most as many as a part of `in_parts`."""
    selected = f"SELECT {', '.join(columns)} FROM {table.name} WHERE {by}"
    if is_single_writer(connection):
        return _driver(connection).execute(f"{selected} IN ({', '.join('?' * len(values))})", values)
    # The same statement however many there are, so that it is prepared once.
    return run(connection, f"{selected} = ANY(?)", ([*values],))


def insert_rows(
    connection: Connection,
    table: Table,
    new: Sequence[tuple[Any, ...]],
    *,
    without: str | None = None,
    if_new: bool = False,
) -> int:
    """Insert rows, each with a value for every column of the table, in that order; returns how many were inserted.

    Args:
        without: a column that the rows have no value for.
        if_new: skip rows that a unique index has already.
    """
    if not new:
        return 0
    if is_single_writer(connection):
        return _insert_in_file(connection, table, new, without, if_new)
    if not if_new:
        return _copy(connection, table, new, without)
    # As text, so that the rows go to the driver unchanged: SQLAlchemy inspects each row.
    names = tuple(column.name for column in table.columns if column.name != without)
    return connection.exec_driver_sql(_statement(table, connection.dialect, names, if_new), list(new)).rowcount


def _insert_in_file(
    connection: Connection, table: Table, new: Sequence[tuple[Any, ...]], without: str | None, if_new: bool
) -> int:
    """Insert into SQLite, without the columns that no row has a value for, and with `bytearray` in the place of bytes.

    For each None and each `bytes`, Python's sqlite3 looks for an adapter, which takes longer than to write the value.
    """
    names: list[str] = []
    values: list[Iterable[Any]] = []
    columns = (column for column in table.columns if column.name != without)
    for column, of_column in zip(columns, zip(*new, strict=True), strict=True):
        if of_column[0] is not None or of_column.count(None) < len(of_column):
            names.append(column.name)
            is_binary = isinstance(column.type, LargeBinary)
            values.append([value and bytearray(value) for value in of_column] if is_binary else of_column)
    statement = _statement(table, connection.dialect, tuple(names), if_new)
    return _driver(connection).executemany(statement, zip(*values, strict=True)).rowcount


def _driver(connection: Connection) -> sqlite3.Connection:
    """Return SQLite's own connection: for a statement that is ready, SQLAlchemy takes longer than SQLite."""
    return connection.connection.driver_connection  # type: ignore[return-value]


def _command(connection: Connection, statement: str) -> None:
    """Execute a statement without values or result."""
    if is_single_writer(connection):
        _driver(connection).execute(statement)
    else:
        connection.exec_driver_sql(statement)


def _copy(connection: Connection, table: Table, new: Sequence[tuple[Any, ...]], without: str | None) -> int:
    """Insert by COPY, in half the time of an INSERT."""
    columns = [column for column in table.columns if column.name != without]
    quoted = ", ".join(connection.dialect.identifier_preparer.quote(column.name) for column in columns)
    with (
        closing(connection.connection.cursor()) as cursor,
        cursor.copy(f"COPY {table.name} ({quoted}) FROM STDIN (FORMAT BINARY)") as copy,  # type: ignore[attr-defined]
    ):
        copy.set_types([_type_of(column, connection.dialect) for column in columns])
        for row in new:
            copy.write_row(row)
    return len(new)


@lru_cache(256)
def _type_of(column: Column[Any], dialect: Dialect) -> str:
    """Return PostgreSQL's name of a column's type."""
    return column.type.compile(dialect).partition(" COLLATE")[0].lower()


@lru_cache(256)
def _statement(table: Table, dialect: Dialect, columns: tuple[str, ...], if_new: bool) -> str:
    insertion = _insert_if_new(table, dialect) if if_new else insert(table)
    return str(insertion.compile(dialect=dialect, column_keys=list(columns)))


def insert_if_new(connection: Connection, table: Table, **values: Any) -> bool:
    """Insert a row unless a unique index has it already; tells whether it was new."""
    insertion = _insert_if_new(table, connection.dialect)
    # Without the option SQLAlchemy keeps the row count of an UPDATE only.
    return connection.execute(insertion, values, execution_options={"preserve_rowcount": True}).rowcount > 0


@lru_cache(64)
def _insert_if_new(table: Table, dialect: Dialect) -> Insert:
    insertion = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect.name]
    # The index is named if it is one column, so that a duplicate primary key is an error. Inline: the key is not read.
    unique = [column for column in table.columns if column.unique]
    return insertion(table).on_conflict_do_nothing(index_elements=unique or None).inline()


def insert_valid(
    connection: Connection,
    records: Sequence[T],
    insert: Callable[[Sequence[T]], int],
    explain: Callable[[Exception], Exception | None],
) -> tuple[int, list[tuple[T, Exception]]]:
    """Insert the records that can be stored, in the caller's transaction, and isolate those that cannot.

    Args:
        insert: inserts records; returns how many are new, and raises if one of them cannot be stored.
        explain: `Database.explanation`.

    Returns:
        How many are new, and each record that cannot be stored with the reason.

    Raises:
        StoreUnavailable, StoreRefused: the database is the reason; then none is stored.
    """
    try:
        with savepoint(connection):
            return insert(records), []
    except Exception as error:
        reason = explain(error) or error
        if isinstance(reason, (StoreUnavailable, StoreRefused)):
            raise
        if len(records) == 1:
            return 0, [(records[0], reason)]
    middle = len(records) // 2
    first, refused = insert_valid(connection, records[:middle], insert, explain)
    second, more = insert_valid(connection, records[middle:], insert, explain)
    return first + second, [*refused, *more]


def in_parts(values: Sequence[T], variables: int = 1) -> Iterator[Sequence[T]]:
    """Split values, each of so many variables, into parts that fit into one statement."""
    length = VARIABLES_AT_ONCE // variables
    for start in range(0, len(values), length):
        yield values[start : start + length]
