"""Generations and losses: inserted and found. The caller owns the transaction."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, false, func, select, tuple_

from agentlightning.errors import InvalidRecord
from agentlightning.generation import STATUSES, VIAS, Generation, Loss, Status
from agentlightning.store import Filters, blocks, prompts, rows, senders, tables, texts
from agentlightning.store.blocks import Lacking
from agentlightning.store.chains import Prompt
from agentlightning.store.database import found, in_parts, insert_rows, insert_valid, next_keys

__all__ = [
    "Added",
    "Cursor",
    "add",
    "add_losses",
    "add_valid",
    "find",
    "has_any",
    "has_losses",
    "key_of",
    "keys_of_blocks",
    "latest",
    "losses",
    "page",
    "tally",
]

FILTERED = {
    name: tables.generations.c[rows.TEXT_KEYS.get(name, name)]
    for name in Filters.__annotations__
    if name not in ("since", "until", "status")
}
IN_ORDER = (tables.generations.c.finished_at, tables.generations.c.key)

Record = TypeVar("Record", Generation, Loss)

logger = logging.getLogger("agentlightning.store")


@dataclass(slots=True)
class Added:
    """The fate of generations that were to be stored.

    Attributes:
        new: how many are new.
        refused: the reason by the id of each that no store can hold.
        lacking: ids of those whose prompts continue blocks that are not there.
        blocks: keys of the blocks that the prompts of the others arrived with, by the ids of the generations.
    """

    new: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    blocks: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)


class Cursor(NamedTuple):
    """Position of a generation in the order in which all are read."""

    finished_at: int
    key: int


def add(
    connection: Connection,
    generations: Sequence[Generation],
    sender_id: str | None = None,
    cut: Mapping[str, Prompt] | None = None,
) -> int:
    """Store generations; returns how many are new. One whose id is known already is left unchanged.

    Args:
        sender_id: who recorded them; an unknown sender counts as none.
        cut: the prompts that arrived in blocks, by the ids of their generations.

    Raises:
        InvalidRecord, ValueError: one of them cannot be stored by any store.
        Lacking: prompts continue blocks that are not there.
    """
    by_id = _unknown(connection, tables.generations, generations)
    new = [*by_id.values()]
    stored = prompts.add(connection, new, cut)
    counts = [(prompt[0], rows.output_tokens(each)) for prompt, each in zip(stored, new, strict=True)]
    sender_key = senders.count_generations(connection, sender_id, new, counts, time.time_ns())
    keys = texts.keys_of(connection, rows.repeated_texts(new))
    numbered = next_keys(connection, tables.generations, len(new))
    every = zip(new, by_id, stored, counts, numbered, strict=True)
    insert_rows(connection, tables.generations, [rows.generation_row(*each, keys, sender_key) for each in every])
    choices = ((choice, key) for each, key in zip(new, numbered, strict=True) for choice in each.choices)
    insert_rows(connection, tables.choices, [rows.choice_row(*each, keys) for each in choices])
    return len(new)


def add_valid(
    connection: Connection,
    generations: Sequence[Generation],
    sender_id: str | None,
    explain: Callable[[Exception], Exception | None],
    cut: Mapping[str, Prompt] | None = None,
) -> Added:
    """Store the generations that can be stored.

    Args:
        explain: `Database.explanation`.
        cut: as for `add`.

    Raises:
        StoreUnavailable, StoreRefused: the database is the reason; then none is stored.
    """
    new, failed = insert_valid(connection, generations, lambda some: add(connection, some, sender_id, cut), explain)
    refused: dict[str, str] = {}
    lacking: list[str] = []
    for each, error in failed:
        if isinstance(error, Lacking):
            lacking.append(each.id)
            continue
        if not isinstance(error, (InvalidRecord, ValueError)):
            logger.error("a generation cannot be stored", exc_info=error)
        refused[str(each.id)] = str(error) or type(error).__name__
    stored = {name: prompt for name, prompt in (cut or {}).items() if name not in refused and name not in lacking}
    return Added(new, refused, lacking, keys_of_blocks(connection, stored))


def keys_of_blocks(connection: Connection, cut: Mapping[str, Prompt]) -> dict[str, tuple[list[int], list[int]]]:
    """Return the keys of the blocks in prompts that were added, for the ids and the text of each."""
    return {
        name: (blocks.keys_of(connection, prompt.ids), blocks.keys_of(connection, prompt.text))
        for name, prompt in cut.items()
    }


def page(
    connection: Connection, filters: Filters, after: Cursor | None, limit: int
) -> tuple[list[Generation], Cursor | None]:
    """Read a page of the generations that match the filters, in the order in which they finished.

    Args:
        after: where the previous page ended; None for the first page.
        limit: number of generations on a page.

    Returns:
        The page, and where it ends; None where nothing comes after it.
    """
    query = select(tables.generations).where(*_conditions(connection, filters)).order_by(*IN_ORDER).limit(limit)
    if after is not None:
        query = query.where(tuple_(*IN_ORDER) > tuple_(*after))
    found = connection.execute(query).all()
    end = Cursor(found[-1].finished_at, found[-1].key) if len(found) == limit else None
    return _generations_of(connection, found), end


def find(connection: Connection, generation_id: str) -> Generation | None:
    """Find a generation by its id."""
    with suppress(InvalidRecord):
        wanted = tables.generations.c.id == rows.uuid_bytes(generation_id)
        for each in _generations_of(connection, connection.execute(select(tables.generations).where(wanted)).all()):
            return each
    return None


def latest(connection: Connection, filters: Filters, limit: int) -> Iterator[Generation]:
    """Iterate over the latest generations that match the filters, last finished first; each is read on demand."""
    backwards = [column.desc() for column in IN_ORDER]
    key = tables.generations.c.key
    query = select(key).where(*_conditions(connection, filters)).order_by(*backwards).limit(limit)
    for each in connection.execute(query).scalars().all():
        row = connection.execute(select(tables.generations).where(key == each)).all()
        yield from _generations_of(connection, row)


def key_of(connection: Connection, generation_id: str) -> int | None:
    """Return the key of a generation; None where the id is unknown."""
    with suppress(InvalidRecord):
        wanted = tables.generations.c.id == rows.uuid_bytes(generation_id)
        return connection.execute(select(tables.generations.c.key).where(wanted)).scalar()
    return None


def tally(connection: Connection, filters: Filters) -> dict[Status, int]:
    """Count the generations that match the filters, by status; every status is a key."""
    status = tables.generations.c.status
    query = select(status, func.count().label("how_many")).where(*_conditions(connection, filters)).group_by(status)
    found = {row.status: row.how_many for row in connection.execute(query)}
    return {name: found.get(number, 0) for number, name in enumerate(STATUSES)}


def has_any(connection: Connection, filters: Filters) -> bool:
    """Tell whether a generation matches the filters."""
    query = select(tables.generations.c.key).where(*_conditions(connection, filters)).limit(1)
    return connection.execute(query).first() is not None


def add_losses(connection: Connection, new: Sequence[Loss]) -> int:
    """Store reports of losses; returns how many are new. One whose id is known already is left unchanged."""
    unknown = _unknown(connection, tables.losses, new).values()
    keys = next_keys(connection, tables.losses, len(unknown))
    insert_rows(connection, tables.losses, [rows.loss_row(*each) for each in zip(unknown, keys, strict=True)])
    return len(unknown)


def losses(connection: Connection) -> Iterator[Loss]:
    """Iterate over the reports of losses, in the order in which they were stored."""
    return map(rows.loss_of, connection.execute(select(tables.losses).order_by(tables.losses.c.key)))


def has_losses(connection: Connection) -> bool:
    """Tell whether any loss is reported."""
    return connection.execute(select(tables.losses.c.key).limit(1)).first() is not None


def _generations_of(connection: Connection, found: Sequence[Any]) -> list[Generation]:
    """Build the generations of these rows, with their choices and texts."""
    table = tables.choices
    in_order = table.c.generation_key, table.c.index
    query = select(table).where(table.c.generation_key.in_([row.key for row in found])).order_by(*in_order)
    choices = connection.execute(query).all()
    known = texts.texts_of(connection, rows.text_keys(found, choices))
    of_each = {key: list(group) for key, group in groupby(choices, lambda choice: choice.generation_key)}
    ids, whole = prompts.ids_of(connection, found), prompts.texts_of(connection, found)
    return [
        rows.generation_of(row, of_each.get(row.key, ()), known, prompt)
        for row, prompt in zip(found, zip(ids, whole, strict=True), strict=True)
    ]


def _unknown(connection: Connection, table: Table, records: Iterable[Record]) -> dict[bytes, Record]:
    """Return the records that the table does not have yet, by their ids in bytes."""
    by_id = {rows.uuid_bytes(record.id): record for record in records}
    for some in in_parts(list(by_id)):
        for (known,) in found(connection, table, ("id",), "id", some):
            del by_id[bytes(known)]
    return by_id


def _conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    return [_condition(connection, name, value) for name, value in filters.items()]


def _number_of(values: Sequence[str], name: str, value: str) -> int:
    if value not in values:
        raise InvalidRecord(f"{name}: {value!r:.100} is not one of {', '.join(values)}")
    return values.index(value)


def _condition(connection: Connection, name: str, value: Any) -> ColumnElement[bool]:
    """Translate a filter into a condition on a row."""
    if name == "since":
        return tables.generations.c.finished_at >= value
    if name == "until":
        return tables.generations.c.finished_at < value
    if name == "status":
        return tables.generations.c.status == _number_of(STATUSES, name, value)
    column = FILTERED[name]
    if value is None or (name == "attempt_id" and value == ""):
        return column.is_(None)
    if name == "call_id":
        with suppress(InvalidRecord):
            return column == rows.uuid_bytes(value)
        return false()
    if name == "response_id":
        return column == rows.storable(value)
    if name == "retry":
        return column == value
    if name == "via":
        return column == _number_of(VIAS, name, value)
    key = texts.key_of(connection, value)
    return false() if key is None else column == key
