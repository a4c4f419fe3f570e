"""What a store stands on: a database that has our tables, and transactions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, Insert, Table, insert
from sqlalchemy.dialects import sqlite

__all__ = ["Database", "in_parts", "insert_if_new", "insert_rows"]

# Builds of SQLite before 3.32 take no more than 999 in a statement.
VARIABLES_AT_ONCE = 500

T = TypeVar("T")


class Database(ABC):
    """Has the tables of this version. Safe for several threads, not for a fork.

    Whatever is done with its connections raises `StoreUnavailable`, `StoreRefused`, or `ValueError` where a value is
    the reason.
    """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that sees the database as it is at its first query."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that is undone where the block raises."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent."""


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
    # As text, so that the rows go to the driver as they are: SQLAlchemy looks through each for as long as SQLite takes
    # to write it.
    if not new:
        return 0
    return connection.exec_driver_sql(_statement(table, connection.dialect, without, if_new), list(new)).rowcount


@lru_cache(64)
def _statement(table: Table, dialect: Dialect, without: str | None, if_new: bool) -> str:
    insertion = _insert_if_new(table, dialect) if if_new else insert(table)
    columns = [column.name for column in table.columns if column.name != without]
    return str(insertion.compile(dialect=dialect, column_keys=columns))


def insert_if_new(connection: Connection, table: Table) -> Insert:
    """An INSERT that leaves out what a unique index has already."""
    return _insert_if_new(table, connection.dialect)


@lru_cache(64)
def _insert_if_new(table: Table, dialect: Dialect) -> Insert:
    return {"sqlite": sqlite.insert}[dialect.name](table).on_conflict_do_nothing()


def in_parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as a statement has room for."""
    for start in range(0, len(values), VARIABLES_AT_ONCE):
        yield values[start : start + VARIABLES_AT_ONCE]
