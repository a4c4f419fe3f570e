"""What a store stands on: a database that has our tables, and what differs between the databases that may be it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, CursorResult, Dialect, Insert, Table, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from agentlightning.errors import StoreUnavailable

__all__ = [
    "Conflict",
    "Database",
    "Unkeepable",
    "found",
    "in_parts",
    "insert_if_new",
    "insert_rows",
    "next_keys",
    "now",
    "run",
    "takes_turns",
    "transaction",
]

# Builds of SQLite before 3.32 take no more than 999 in a statement.
VARIABLES_AT_ONCE = 500
# How often what others are in the way of is tried.
CONFLICTS = 5

T = TypeVar("T")


class Conflict(StoreUnavailable):
    """Somebody else wrote the same at this moment. Nothing of it is kept; at once again, it should work."""


class Unkeepable(ValueError):
    """A value that the database cannot hold: whoever sent it is told, and nothing of it is kept."""


class Database(ABC):
    """Has the tables of this version. Safe for several threads, not for a fork.

    Whatever is done with its connections raises `StoreUnavailable`, `StoreRefused`, or `Unkeepable` where a value is
    the reason.
    """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that sees the database as it is at its first query."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that is undone where the block raises."""

    @abstractmethod
    def explanation(self, error: Exception) -> Exception | None:
        """What to raise for an error of the driver; None for one that is none."""

    def tidy(self) -> None:
        """Give back disk space that is not needed any more, unless that would have to wait for others."""
        return

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises what the driver's errors mean in their place."""
        try:
            yield
        except Exception as error:
            meaning = self.explanation(error)
            if meaning is None:
                raise
            raise meaning from error

    def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, when it is committed; where others were in its way, it is done again."""
        for _ in range(CONFLICTS - 1):
            with suppress(Conflict), self.writing() as connection:
                return work(connection)
        with self.writing() as connection:
            return work(connection)


@contextmanager
def transaction(connection: Connection, begin: str) -> Iterator[None]:
    """The block, between a statement that begins a transaction and one that commits it, or takes it back."""
    connection.exec_driver_sql(begin)
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        # SQLite has taken it back itself where the disk is full, PostgreSQL where it is gone.
        with suppress(SQLAlchemyError):
            connection.exec_driver_sql("ROLLBACK")
        raise


def takes_turns(connection: Connection) -> bool:
    """Whether nobody else writes while this transaction does."""
    return connection.dialect.name == "sqlite"


def now(connection: Connection) -> float:
    """Seconds since the epoch, by the one clock that all who write go by: a database of several hosts has its own."""
    if takes_turns(connection):
        return time.time()
    return connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())::float8").scalar_one()


def next_keys(connection: Connection, table: Table, how_many: int) -> Sequence[int]:
    """Numbers for the column `key` of new rows, each higher than the one before it, that nobody else gets."""
    if takes_turns(connection):
        first = (connection.execute(select(func.max(table.c.key))).scalar() or 0) + 1
        return range(first, first + how_many)
    query = "SELECT nextval(%s::regclass) FROM generate_series(1, %s)"
    return connection.exec_driver_sql(query, (f"{table.name}_key_seq", how_many)).scalars().all()


def run(connection: Connection, statement: str, values: Sequence[Any]) -> CursorResult[Any]:
    """What a statement gives that is text, with a ? for each of the values.

    SQLAlchemy takes longer to put one together than the database to answer it.
    """
    if not takes_turns(connection):
        statement = statement.replace("?", "%s")
    return connection.exec_driver_sql(statement, tuple(values))


def found(
    connection: Connection, table: Table, columns: Sequence[str], by: str, values: Sequence[Any]
) -> Iterable[Sequence[Any]]:
    """These columns of the rows whose column `by` has one of the values: no more of them than `in_parts` gives."""
    query = f"SELECT {', '.join(columns)} FROM {table.name} WHERE {by} IN ({', '.join('?' * len(values))})"
    return run(connection, query, values)


def insert_rows(
    connection: Connection,
    table: Table,
    new: Sequence[tuple[Any, ...]],
    *,
    without: str | None = None,
    if_new: bool = False,
) -> int:
    """Insert rows, each of which has a value for every column of the table, in their order; returns how many.

    Args:
        without: the column that the rows have nothing for.
        if_new: leave out those that a unique index has already.
    """
    if not new:
        return 0
    if not takes_turns(connection) and not if_new:
        return _copy(connection, table, new, without)
    # As text, so that the rows go to the driver as they are: SQLAlchemy looks through each for as long as SQLite takes
    # to write it.
    return connection.exec_driver_sql(_statement(table, connection.dialect, without, if_new), list(new)).rowcount


def _copy(connection: Connection, table: Table, new: Sequence[tuple[Any, ...]], without: str | None) -> int:
    """What an INSERT does, in half the time."""
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
    """PostgreSQL's name of a column's type."""
    return column.type.compile(dialect).partition(" COLLATE")[0].lower()


@lru_cache(64)
def _statement(table: Table, dialect: Dialect, without: str | None, if_new: bool) -> str:
    insertion = _insert_if_new(table, dialect) if if_new else insert(table)
    columns = [column.name for column in table.columns if column.name != without]
    return str(insertion.compile(dialect=dialect, column_keys=columns))


def insert_if_new(connection: Connection, table: Table, **values: Any) -> bool:
    """Insert a row, unless a unique index has it already; returns whether it was new."""
    insertion = _insert_if_new(table, connection.dialect)
    # Else SQLAlchemy tells of an UPDATE alone how many rows there were.
    return connection.execute(insertion, values, execution_options={"preserve_rowcount": True}).rowcount > 0


@lru_cache(64)
def _insert_if_new(table: Table, dialect: Dialect) -> Insert:
    insertion = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect.name]
    # Named where it is one column, so that a key that was given out twice is an error. Inline: nobody asks for the key.
    unique = [column for column in table.columns if column.unique]
    return insertion(table).on_conflict_do_nothing(index_elements=unique or None).inline()


def in_parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as a statement has room for."""
    for start in range(0, len(values), VARIABLES_AT_ONCE):
        yield values[start : start + VARIABLES_AT_ONCE]
