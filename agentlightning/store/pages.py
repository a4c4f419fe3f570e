"""Which rows a query finds, page by page."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Boolean, Column, ColumnElement, Connection, and_, false, func, or_, select, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

__all__ = ["Logic", "Page", "contains", "find_page", "matching"]

Logic = Literal["and", "or"]


@dataclass(frozen=True, slots=True)
class Page:
    """The keys of the rows on a page, in order, and how many rows there are on all of them."""

    keys: Sequence[int]
    total: int


def find_page(
    connection: Connection,
    key: Column[int],
    where: ColumnElement[bool],
    order_by: Column[Any] | None,
    descending: bool,
    limit: int,
    offset: int,
) -> Page:
    """The keys of a page: keys alone, since the rows of one that has all may be more than there is memory for.

    Args:
        key: the column that stands for a row; rows that are equal otherwise are in its order, in both directions.
        limit: -1 is all.
    """
    order = [key.desc() if descending else key] if order_by is None else [_in_order(order_by, descending), key]
    query = select(key).where(where).order_by(*order)
    if limit >= 0:
        query = query.limit(limit)
    found = array("q", connection.execute(query.offset(offset) if offset else query).scalars())
    if limit < 0 and not offset:
        return Page(found, len(found))
    total = connection.execute(select(func.count()).select_from(key.table).where(where)).scalar_one()
    return Page(found, total)


def _in_order(column: Column[Any], descending: bool) -> ColumnElement[Any]:
    """As Agent Lightning 0.3 has it: a moment that has not come is the latest; what else is missing is the least."""
    order = column.desc() if descending else column.asc()
    if not column.nullable:
        return order
    return order.nulls_last() if column.name.endswith("_time") != descending else order.nulls_first()


class contains(FunctionElement[bool]):  # noqa: N801
    """`contains(column, part)`: whether a text has this part, in this case; a LIKE of SQLite tells no `a` from `A`."""

    type = Boolean()
    inherit_cache = True


@compiles(contains, "sqlite")
def _in_sqlite(element: contains, compiler: Any, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)}) > 0"


@compiles(contains, "postgresql")
def _in_postgresql(element: contains, compiler: Any, **options: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **options)}) > 0"


def matching(conditions: Iterable[ColumnElement[bool]], logic: Logic) -> ColumnElement[bool]:
    """Whether all or one of them hold; without any, every row matches."""
    found = list(conditions)
    if not found:
        return true()
    return and_(*found) if logic == "and" else or_(false(), *found)
