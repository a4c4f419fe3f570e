"""Generations and losses: inserted and found. The caller owns the transaction."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, false, func, null, select, tuple_

from agentlightning.errors import InvalidRecord
from agentlightning.generation import STATUSES, Choice, Generation, Loss, SharedText, Status, Uuid
from agentlightning.store import Filters, blocks, prompts, rows, senders, tables, texts
from agentlightning.store.blocks import Lacking
from agentlightning.store.chains import Prompt
from agentlightning.store.database import found, in_parts, insert_rows, insert_valid, next_keys
from agentlightning.store.stale import mark_calls

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

DETAILS = ("logprobs", "routed_experts", "sampling_mask", "top_logprobs", "prompt_logprobs")
"""Columns with a value for each id, or several."""
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
    if not new:
        return 0
    # Column by column: a function called for each value would cost as much as SQLite.
    prompt_columns = [*zip(*prompts.add(connection, new, cut), strict=True)]
    output_tokens = [_output_tokens(each) for each in new]
    sender_key = senders.count_generations(connection, sender_id, new, prompt_columns[0], output_tokens, time.time_ns())
    choices = [choice for each in new for choice in each.choices]
    values, values_of_choices = rows.GENERATION.values_of(new), rows.CHOICE.values_of(choices)
    values["attempt_id"] = [each or None for each in values["attempt_id"]]
    wanted = rows.GENERATION.texts_in(values) | rows.CHOICE.texts_in(values_of_choices)
    keys = texts.keys_of(connection, wanted)
    columns = rows.GENERATION.columns_of(values, keys)
    numbered = next_keys(connection, tables.generations, len(new))
    own = numbered, by_id, [sender_key] * len(new), output_tokens, *prompt_columns[:3]
    insert_rows(connection, tables.generations, [*zip(*own, *columns, *prompt_columns[3:], strict=True)])
    keys_of_choices = [key for each, key in zip(new, numbered, strict=True) for _ in each.choices]
    columns = rows.CHOICE.columns_of(values_of_choices, keys)
    insert_rows(connection, tables.choices, [*zip(keys_of_choices, *columns, strict=True)])
    mark_calls(
        connection,
        (each.rollout_id for each in new),
        (each.response_id for each in new if each.rollout_id is None),
    )
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
    connection: Connection, filters: Filters, after: Cursor | None, limit: int, details: bool = True
) -> tuple[list[Generation], Cursor | None]:
    """Read a page of the generations that match the filters, in the order in which they finished.

    Args:
        after: where the previous page ended; None for the first page.
        limit: number of generations on a page.
        details: whether to read what there is for each id, which is None without.

    Returns:
        The page, and where it ends; None where nothing comes after it.
    """
    columns = _columns(tables.generations, details)
    query = select(*columns).where(*_conditions(connection, filters)).order_by(*IN_ORDER).limit(limit)
    if after is not None:
        query = query.where(tuple_(*IN_ORDER) > tuple_(*after))
    found = connection.execute(query).all()
    end = Cursor(found[-1].finished_at, found[-1].key) if len(found) == limit else None
    return _generations_of(connection, found, details), end


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
    unknown = [*_unknown(connection, tables.losses, new).values()]
    keys = next_keys(connection, tables.losses, len(unknown))
    columns = rows.LOSS.columns_of(rows.LOSS.values_of(unknown), {})
    insert_rows(connection, tables.losses, [*zip(keys, *columns, strict=True)])
    return len(unknown)


def losses(connection: Connection) -> Iterator[Loss]:
    """Iterate over the reports of losses, in the order in which they were stored."""
    found = connection.execute(select(tables.losses).order_by(tables.losses.c.key)).all()
    return (Loss(**fields) for fields in rows.LOSS.records_of(found, {}))


def has_losses(connection: Connection) -> bool:
    """Tell whether any loss is reported."""
    return connection.execute(select(tables.losses.c.key).limit(1)).first() is not None


def _columns(table: Table, details: bool) -> list[ColumnElement[Any]]:
    """Return the columns to read, those of details as null where these are not wanted."""
    return [each if details or each.name not in DETAILS else null().label(each.name) for each in table.c]


def _generations_of(connection: Connection, found: Sequence[Any], details: bool = True) -> list[Generation]:
    """Build the generations of these rows, with their choices and texts."""
    table = tables.choices
    in_order = table.c.generation_key, table.c.index
    query = (
        select(*_columns(table, details))
        .where(table.c.generation_key.in_([row.key for row in found]))
        .order_by(*in_order)
    )
    choices = connection.execute(query).all()
    known = texts.texts_of(connection, rows.GENERATION.keys_in(found) | rows.CHOICE.keys_in(choices))
    of_each: defaultdict[int, list[Choice]] = defaultdict(list)
    for row, fields in zip(choices, rows.CHOICE.records_of(choices, known), strict=True):
        of_each[row.generation_key].append(Choice(**fields))
    generations: list[Generation] = []
    all_fields = rows.GENERATION.records_of(found, known)
    ids, whole = prompts.ids_of(connection, found), prompts.texts_of(connection, found)
    for row, fields, prompt_token_ids, prompt_text in zip(found, all_fields, ids, whole, strict=True):
        fields |= {"id": rows.uuid_text(row.id), "attempt_id": fields["attempt_id"] or None}
        fields |= {"prompt_token_ids": prompt_token_ids, "prompt_text": prompt_text, "choices": of_each[row.key]}
        generations.append(Generation(**fields))
    return generations


def _output_tokens(generation: Generation) -> int:
    """Count the ids of all choices."""
    return sum([len(choice.token_ids) for choice in generation.choices if choice.token_ids is not None])


def _unknown(connection: Connection, table: Table, records: Iterable[Record]) -> dict[bytes, Record]:
    """Return the records that the table does not have yet, by their ids in bytes."""
    by_id = {rows.uuid_bytes(record.id): record for record in records}
    for some in in_parts(list(by_id)):
        for (known,) in found(connection, table, ("id",), "id", some):
            del by_id[bytes(known)]
    return by_id


def _conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    return [_condition(connection, name, value) for name, value in filters.items()]


def _condition(connection: Connection, name: str, value: Any) -> ColumnElement[bool]:
    """Translate a filter into a condition on a row."""
    if name == "since":
        return tables.generations.c.finished_at >= value
    if name == "until":
        return tables.generations.c.finished_at < value
    column, of = tables.generations.c[rows.GENERATION.columns[name]], rows.GENERATION.fields[name].type
    if value is None or (name == "attempt_id" and value == ""):
        return column.is_(None)
    if of == SharedText:
        key = texts.key_of(connection, value)
        return false() if key is None else column == key
    try:
        return column == (rows.PACKINGS[of][0](value) if of in rows.PACKINGS else value)
    except InvalidRecord as error:
        if of == Uuid:
            return false()
        raise InvalidRecord(f"{name}: {error}") from error
