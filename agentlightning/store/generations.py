"""Generations and losses: put in, and found again. Everything here works inside a transaction of somebody else's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, false, func, select, tuple_

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import STATUSES, Generation, Loss, Status
from agentlightning.store import Filters, rows, senders, tables, texts
from agentlightning.store.database import found, in_parts, insert_rows, next_keys

__all__ = [
    "Place",
    "add",
    "add_losses",
    "add_valid",
    "find",
    "has_any",
    "has_losses",
    "key_of",
    "latest",
    "losses",
    "page",
    "tally",
]

FILTERED = {
    "rollout_id": tables.generations.c.rollout_key,
    "attempt_id": tables.generations.c.attempt_key,
    "session_id": tables.generations.c.session_key,
    "call_id": tables.generations.c.call_id,
    "response_id": tables.generations.c.response_id,
    "model": tables.generations.c.model_key,
}
IN_ORDER = (tables.generations.c.finished_at, tables.generations.c.key)

Record = TypeVar("Record", Generation, Loss)


class Place(NamedTuple):
    """Where a generation stands in the order in which all are read."""

    finished_at: int
    key: int


def add(connection: Connection, generations: Sequence[Generation], sender_id: str | None = None) -> int:
    """Keep generations; returns how many are new. One whose id is known is left as it is.

    Args:
        sender_id: whose they are; one that is not known is as none.

    Raises:
        ValueError: one of them cannot be kept by any store.
    """
    new = _unknown(connection, tables.generations, generations)
    counts = [rows.token_counts(generation) for generation in new]
    sender_key = senders.note(connection, sender_id, new, counts, time.time_ns())
    keys = texts.keys_of(connection, {text for generation in new for text in rows.repeated_texts(generation)})
    numbered = list(zip(new, counts, next_keys(connection, tables.generations, len(new)), strict=True))
    insert_rows(connection, tables.generations, [rows.generation_row(*each, keys, sender_key) for each in numbered])
    choices = ((choice, key) for generation, _, key in numbered for choice in generation.choices)
    insert_rows(connection, tables.choices, [rows.choice_row(*each, keys) for each in choices])
    return len(new)


def add_valid(
    connection: Connection,
    generations: Sequence[Generation],
    sender_id: str | None,
    explain: Callable[[Exception], Exception | None],
) -> tuple[int, dict[str, str]]:
    """Keep the generations that can be kept, in the transaction that is open.

    Args:
        explain: gives what to raise for an error of the database's driver, as `Database.explanation` does.

    Returns:
        How many are new, and by the id of each that cannot be kept, why.

    Raises:
        StoreUnavailable, StoreRefused: the database is the reason; then none is kept.
    """
    connection.exec_driver_sql("SAVEPOINT valid")
    try:
        new = add(connection, generations, sender_id)
    except Exception as error:
        meaning = explain(error) or error
        if isinstance(meaning, (StoreUnavailable, StoreRefused)):
            raise
        connection.exec_driver_sql("ROLLBACK TO valid")
        connection.exec_driver_sql("RELEASE valid")
        if len(generations) == 1:
            return 0, {str(generations[0].id): str(meaning) or type(meaning).__name__}
    else:
        connection.exec_driver_sql("RELEASE valid")
        return new, {}
    middle = len(generations) // 2
    first, reasons = add_valid(connection, generations[:middle], sender_id, explain)
    second, more = add_valid(connection, generations[middle:], sender_id, explain)
    return first + second, reasons | more


def page(
    connection: Connection, filters: Filters, after: Place | None, limit: int
) -> tuple[list[Generation], Place | None]:
    """So many of those that the filters let through, in the order in which they finished.

    Args:
        after: where the page before ended; None for the first.

    Returns:
        The page, and where it ends; None where nothing comes after it.
    """
    query = select(tables.generations).where(*_conditions(connection, filters)).order_by(*IN_ORDER).limit(limit)
    if after is not None:
        query = query.where(tuple_(*IN_ORDER) > tuple_(*after))
    found = connection.execute(query).all()
    end = Place(found[-1].finished_at, found[-1].key) if len(found) == limit else None
    return _generations_of(connection, found), end


def find(connection: Connection, generation_id: str) -> Generation | None:
    """The generation of this id."""
    with suppress(ValueError):
        wanted = tables.generations.c.id == rows.uuid_bytes(generation_id)
        for each in _generations_of(connection, connection.execute(select(tables.generations).where(wanted)).all()):
            return each
    return None


def latest(connection: Connection, filters: Filters, limit: int) -> Iterator[Generation]:
    """So many of those that the filters let through, the last to finish first, each read when it is asked for."""
    backwards = [column.desc() for column in IN_ORDER]
    key = tables.generations.c.key
    query = select(key).where(*_conditions(connection, filters)).order_by(*backwards).limit(limit)
    for each in connection.execute(query).scalars().all():
        row = connection.execute(select(tables.generations).where(key == each)).all()
        yield from _generations_of(connection, row)


def key_of(connection: Connection, generation_id: str) -> int | None:
    """The key of the generation of this id; None where there is none."""
    with suppress(ValueError):
        wanted = tables.generations.c.id == rows.uuid_bytes(generation_id)
        return connection.execute(select(tables.generations.c.key).where(wanted)).scalar()
    return None


def tally(connection: Connection, filters: Filters) -> dict[Status, int]:
    """How many the filters let through, by status; every status is there."""
    status = tables.generations.c.status
    query = select(status, func.count().label("how_many")).where(*_conditions(connection, filters)).group_by(status)
    found = {row.status: row.how_many for row in connection.execute(query)}
    return {name: found.get(number, 0) for number, name in enumerate(STATUSES)}


def has_any(connection: Connection, filters: Filters) -> bool:
    """Whether the filters let one through."""
    query = select(tables.generations.c.key).where(*_conditions(connection, filters)).limit(1)
    return connection.execute(query).first() is not None


def add_losses(connection: Connection, new: Sequence[Loss]) -> int:
    """Write down what could not be kept; returns how many are new. One whose id is known is left as it is."""
    unknown = _unknown(connection, tables.losses, new)
    keys = next_keys(connection, tables.losses, len(unknown))
    insert_rows(connection, tables.losses, [rows.loss_row(*each) for each in zip(unknown, keys, strict=True)])
    return len(unknown)


def losses(connection: Connection) -> Iterator[Loss]:
    """What could not be kept, in the order in which it was written down."""
    return map(rows.loss_of, connection.execute(select(tables.losses).order_by(tables.losses.c.key)))


def has_losses(connection: Connection) -> bool:
    """Whether there is one that could not be kept."""
    return connection.execute(select(tables.losses.c.key).limit(1)).first() is not None


def _generations_of(connection: Connection, found: Sequence[Any]) -> list[Generation]:
    """The generations of these rows, with their choices and texts."""
    table = tables.choices
    in_order = table.c.generation_key, table.c.index
    query = select(table).where(table.c.generation_key.in_([row.key for row in found])).order_by(*in_order)
    choices = connection.execute(query).all()
    known = texts.texts_of(connection, rows.text_keys(found, choices))
    of_each = {key: list(group) for key, group in groupby(choices, lambda choice: choice.generation_key)}
    return [rows.generation_of(row, of_each.get(row.key, ()), known) for row in found]


def _unknown(connection: Connection, table: Table, records: Iterable[Record]) -> list[Record]:
    """Those that the table does not have yet, each once."""
    by_id = {rows.uuid_bytes(record.id): record for record in records}
    for some in in_parts(list(by_id)):
        for (known,) in found(connection, table, ("id",), "id", some):
            del by_id[bytes(known)]
    return list(by_id.values())


def _conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    return [_condition(connection, name, value) for name, value in filters.items()]


def _condition(connection: Connection, name: str, value: Any) -> ColumnElement[bool]:
    """What a filter asks of a row."""
    if name == "since":
        return tables.generations.c.finished_at >= value
    if name == "until":
        return tables.generations.c.finished_at < value
    if name == "status":
        return tables.generations.c.status == STATUSES.index(value)
    column = FILTERED[name]
    if value is None:
        return column.is_(None)
    if name == "call_id":
        with suppress(ValueError):
            return column == rows.uuid_bytes(value)
        return false()
    if name == "response_id":
        return column == rows.storable(value)
    key = texts.key_of(connection, value)
    return false() if key is None else column == key
