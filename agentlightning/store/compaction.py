"""Tables of PostgreSQL made smaller in short steps, beside writers.

A plain `VACUUM` returns only the pages at the end of a table, and `VACUUM FULL` keeps everybody out while it writes
the table anew. So rows at the end are moved: deleted and inserted again by one statement, they and their values in the
TOAST table go to pages that are free further ahead, and the next `VACUUM` returns the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from sqlalchemy import Connection

from agentlightning.errors import StoreUnavailable

__all__ = ["compact"]

WORTH_BYTES, WORTH_SHARE = 8 * 1024 * 1024, 0.2
"""Free space that is left alone: what is written next soon takes it."""
WORTH_REPEATING = 0.9
"""Share of its size that a table may keep if its rows are to be moved once more."""
FIRST_BYTES, SECONDS_AT_ONCE = 2 * 1024 * 1024, 0.1
"""Part of a table that the first transaction moves, and the time for each, during which no other process writes."""
ROW_BYTES = 40
"""A row's header, pointer and padding."""
TOAST = 1.05
"""Bytes that a TOAST table takes for each of its own, full."""

Transactions = Callable[[], AbstractContextManager[Connection]]


@dataclass
class _Size:
    """A table and its TOAST table; without their indexes.

    Attributes:
        pages: of the table itself.
        bytes: that both take.
        used: about how many of the bytes are rows.
    """

    pages: int
    bytes: int
    used: int

    def is_loose(self) -> bool:
        return self.bytes - self.used > max(WORTH_BYTES, WORTH_SHARE * self.bytes)

    def first_to_move(self) -> int:
        """Return the page where the table would end without free space.

        Where half of the space is free, it is the first: only superusers may see where in the TOAST table a row's
        values are.
        """
        return self.pages * self.used // self.bytes if 2 * self.used > self.bytes else 0


def compact(
    table: str, reading: Transactions, writing_alone: Transactions, statement: Callable[[str], None]
) -> Iterator[None]:
    """Return the free space of a table to the file system, a step for each value.

    It may be abandoned between any two steps. Nothing is moved while `VACUUM` cannot free what was deleted: for a user
    who does not own the table, and beside a transaction that is older and can still see it.

    Args:
        reading: begins a transaction that reads.
        writing_alone: begins one that writes, while no other does. Whoever waits for a row to change would not find
            it after it was moved.
        statement: runs a statement outside a transaction.
    """
    with suppress(StoreUnavailable):
        for index in _left_behind(table, reading):
            statement(f"DROP INDEX CONCURRENTLY {index}")
    statement(f"VACUUM {table}")
    yield
    was_moved = False
    size = _size(table, reading)
    while size.is_loose() and _is_vacuumed(table, reading):
        with writing_alone() as connection:
            began = connection.exec_driver_sql("SELECT pg_current_xact_id()::xid::text").scalar_one()
        end, at_once, first = size.pages, size.pages * FIRST_BYTES // size.bytes, size.first_to_move()
        while end > first:
            begin = max(first, end - max(1, at_once))
            with writing_alone() as connection:
                started = time.monotonic()
                # From PostgreSQL 14 on, such a range alone is scanned.
                pages = f"ctid >= '({begin},0)' AND ctid < '({end},0)'"
                # What has been moved stays where it is: the space that it leaves is of use only after VACUUM.
                connection.exec_driver_sql(
                    f"WITH moved AS (DELETE FROM {table} "
                    f"WHERE {pages} AND age(xmin) > age('{began}'::xid) RETURNING *) "
                    f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM moved"
                )
            # Rows may lie close together here, and further ahead be rare.
            end, share = begin, SECONDS_AT_ONCE / (time.monotonic() - started)
            at_once = max(1, int(at_once * min(2.0, share)))
            was_moved = True
            yield
        statement(f"VACUUM {table}")
        yield
        before, size = size, _size(table, reading)
        if size.bytes > WORTH_REPEATING * before.bytes:
            break
    for index in _indexes(table, reading) if was_moved else ():
        # Without this, they would keep the size that they had for all rows. It waits for all who read, and is left for
        # the next time where that takes too long.
        with suppress(StoreUnavailable):
            statement(f"REINDEX INDEX CONCURRENTLY {index}")
        yield


def _is_vacuumed(table: str, reading: Transactions) -> bool:
    """Tell whether a `VACUUM` of this user has freed the space of nearly all rows that were deleted."""
    with reading() as connection:
        is_own, live, dead = connection.exec_driver_sql(
            "SELECT pg_has_role(relowner, 'USAGE'), reltuples, (SELECT coalesce(sum(n_dead_tup), 0) "
            "FROM pg_stat_all_tables WHERE relid IN (pg_class.oid, reltoastrelid)) "
            "FROM pg_class WHERE oid = %s::regclass",
            (table,),
        ).one()
    return is_own and 10 * dead <= max(live, 0)


def _indexes(table: str, reading: Transactions) -> Sequence[str]:
    with reading() as connection:
        found = connection.exec_driver_sql(
            "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass AND indisvalid", (table,)
        )
        return found.scalars().all()


def _left_behind(table: str, reading: Transactions) -> Sequence[str]:
    """Return the indexes that a `REINDEX` made which was killed: no reader uses them, and each writer pays for them."""
    with reading() as connection:
        found = connection.exec_driver_sql(
            "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass AND NOT indisvalid", (table,)
        )
        return found.scalars().all()


def _size(table: str, reading: Transactions) -> _Size:
    with reading() as connection:
        columns = connection.exec_driver_sql(
            "SELECT quote_ident(attname) FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
            (table,),
        ).scalars()
        values = " + ".join(f"coalesce(pg_column_size({name}), 0)" for name in columns)
        pages, in_all, used = connection.exec_driver_sql(
            f"SELECT pg_relation_size('{table}') / current_setting('block_size')::bigint, pg_table_size('{table}'), "
            f"(SELECT coalesce(sum({values} + {ROW_BYTES}), 0)::bigint FROM {table})"
        ).one()
    return _Size(pages, in_all, int(used * TOAST))
