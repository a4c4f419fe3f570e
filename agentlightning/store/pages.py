"""Lists of rows: filtered, ordered, and read page by page."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Boolean, Column, ColumnElement, Connection, Select, and_, false, func, or_, select, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from agentlightning.errors import InvalidRecord

__all__ = ["ROWS_AT_ONCE", "Listing", "Logic", "Page", "contains", "matching", "parts"]

Logic = Literal["and", "or"]


# Spans have bodies of some KiB, and may have some MiB.
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing.

    Attributes:
        keys: of the rows on this page, in order; keys alone, because a page may be all rows, and more than fits into
            memory.
        total: number of rows on all pages.
    """

    keys: Sequence[int]
    total: int


def _unchanged(_: Connection, rows: list[Any]) -> list[Any]:
    return rows


@dataclass(frozen=True, slots=True)
class Listing:
    """Rows of one kind that match some filters.

    Attributes:
        query: a SELECT of all rows of the kind, which includes `key`.
        key: the column that identifies a row; rows that sort equal are in its order, in both directions.
        where: builds the condition that the listed rows match.
        complete: adds to the rows of a part what is stored elsewhere in the database.
    """

    query: Select[Any]
    key: Column[int]
    where: Callable[[Connection], ColumnElement[bool]]
    complete: Callable[[Connection, list[Any]], list[Any]] = _unchanged

    def page(
        self,
        connection: Connection,
        sort_by: str | None = None,
        descending: bool = False,
        limit: int = -1,
        offset: int = 0,
    ) -> Page:
        """Find the keys of a page.

        Args:
            sort_by: name of a column; None for the order in which the rows were added.
            limit: -1 for all.
        """
        key, where = self.key, self.where(connection)
        if sort_by is None:
            order = [key.desc() if descending else key]
        else:
            if sort_by not in key.table.c:
                raise InvalidRecord(f"sort_by: there is no field {sort_by!r}")
            order = [_in_order(key.table.c[sort_by], descending), key]
        query = select(key).where(where).order_by(*order)
        if limit >= 0:
            query = query.limit(limit)
        found = array("q", connection.execute(query.offset(offset) if offset else query).scalars())
        if limit < 0 and not offset:
            return Page(found, len(found))
        total = connection.execute(select(func.count()).select_from(key.table).where(where)).scalar_one()
        return Page(found, total)

    def rows(self, connection: Connection, keys: Sequence[int]) -> list[Any]:
        """Read the rows with these keys, in this order; those that are gone since are left out."""
        position = list(self.query.selected_columns).index(self.key)
        found = {row[position]: row for row in connection.execute(self.query.where(self.key.in_(keys)))}
        return self.complete(connection, [found[each] for each in keys if each in found])


def parts(keys: Sequence[int]) -> Iterator[Sequence[int]]:
    """Split the keys of a page into parts whose rows fit into memory."""
    for start in range(0, len(keys), ROWS_AT_ONCE):
        yield keys[start : start + ROWS_AT_ONCE]


def _in_order(column: Column[Any], descending: bool) -> ColumnElement[Any]:
    """Order as Agent Lightning 0.3 does: a time that is not known yet is the latest, any other null is the least."""
    order = column.desc() if descending else column.asc()
    if not column.nullable:
        return order
    return order.nulls_last() if column.name.endswith("_time") != descending else order.nulls_first()


class contains(FunctionElement[bool]):  # noqa: N801
    """`contains(column, part)`: case-sensitive substring test; SQLite's LIKE ignores case."""

    type = Boolean()
    inherit_cache = True


@compiles(contains, "sqlite")
def _in_sqlite(element: contains, compiler: Any, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)}) > 0"


@compiles(contains, "postgresql")
def _in_postgresql(element: contains, compiler: Any, **options: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **options)}) > 0"


def matching(conditions: Iterable[ColumnElement[bool]], logic: Logic) -> ColumnElement[bool]:
    """Combine conditions: all (`and`) or one (`or`) of them must hold; without conditions, every row matches."""
    found = list(conditions)
    if not found:
        return true()
    return and_(*found) if logic == "and" else or_(false(), *found)
