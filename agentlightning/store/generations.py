"""Generations in a database: as rows, and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, false, func, select, true, tuple_

from agentlightning.generation import STATUSES, Generation, Loss, Status
from agentlightning.store import Filters, Store, rows, tables
from agentlightning.store.database import Database, in_parts, insert_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DatabaseStore"]

ROWS_AT_ONCE = 64
TEXTS_IN_MEMORY = 10_000
LONG_TEXT = 1_000

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


class DatabaseStore(Store):
    """What `open_store` gives for a database.

    Args:
        database: is closed with the store.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # Texts and their keys, which never change once they are committed.
        self._keys: dict[str | None, int | None] = {None: None}
        self._texts: dict[int | None, str | None] = {None: None}

    def add(self, generations: Sequence[Generation]) -> int:
        if len(self._keys) > TEXTS_IN_MEMORY:
            self._keys = {None: None}
        known = self._keys
        with self._database.writing() as connection:
            new, first = _unknown(connection, tables.generations, generations)
            texts = {None, *(text for generation in new for text in rows.repeated_texts(generation))}
            keys = {text: known[text] for text in texts if text in known}
            fresh = _keys_of(connection, [text for text in texts if text is not None and text not in known])
            keys |= fresh
            numbered = list(zip(new, count(first), strict=False))
            insert_rows(connection, tables.generations, [rows.generation_row(*each, keys) for each in numbered])
            choices = ((choice, key) for generation, key in numbered for choice in generation.choices)
            insert_rows(connection, tables.choices, [rows.choice_row(*each, keys) for each in choices])
        # Only now: a key that is rolled back becomes another text's.
        known |= {text: key for text, key in fresh.items() if len(text) <= LONG_TEXT}
        return len(new)

    def generations(self, **filters: Unpack[Filters]) -> Iterator[Generation]:
        page = select(tables.generations).order_by(*IN_ORDER).limit(ROWS_AT_ONCE)
        after = true()
        while True:
            # A transaction a page: one that is open for long keeps SQLite from emptying the WAL file.
            with self._database.reading() as connection:
                found = connection.execute(page.where(after, *_conditions(connection, filters))).all()
                generations = self._generations_of(connection, found)
            yield from generations
            if len(found) < ROWS_AT_ONCE:
                return
            after = tuple_(*IN_ORDER) > tuple_(found[-1].finished_at, found[-1].key)

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        status = tables.generations.c.status
        with self._database.reading() as connection:
            query = (
                select(status, func.count().label("how_many")).where(*_conditions(connection, filters)).group_by(status)
            )
            found = {row.status: row.how_many for row in connection.execute(query)}
        return {name: found.get(number, 0) for number, name in enumerate(STATUSES)}

    def add_losses(self, losses: Sequence[Loss]) -> None:
        with self._database.writing() as connection:
            new, first = _unknown(connection, tables.losses, losses)
            insert_rows(
                connection, tables.losses, [rows.loss_row(*each) for each in zip(new, count(first), strict=False)]
            )

    def losses(self) -> Iterator[Loss]:
        with self._database.reading() as connection:
            found = connection.execute(select(tables.losses).order_by(tables.losses.c.key)).all()
        yield from map(rows.loss_of, found)

    def close(self) -> None:
        self._database.close()

    def _generations_of(self, connection: Connection, found: Sequence[Any]) -> list[Generation]:
        """The generations of these rows, with their choices and texts."""
        table = tables.choices
        in_order = table.c.generation_key, table.c.index
        query = select(table).where(table.c.generation_key.in_([row.key for row in found])).order_by(*in_order)
        choices = connection.execute(query).all()
        texts = self._texts_of(connection, rows.text_keys(found, choices))
        of_each = {key: list(group) for key, group in groupby(choices, lambda choice: choice.generation_key)}
        return [rows.generation_of(row, of_each.get(row.key, ()), texts) for row in found]

    def _texts_of(self, connection: Connection, keys: set[int | None]) -> Mapping[int | None, str | None]:
        if len(self._texts) > TEXTS_IN_MEMORY:
            self._texts = {None: None}
        table, known = tables.texts, self._texts
        for some in in_parts([key for key in keys if key not in known]):
            found = connection.execute(select(table.c.key, table.c.text).where(table.c.key.in_(some)))
            known |= {row.key: row.text for row in found}
        return known


def _unknown(connection: Connection, table: Table, records: Iterable[Record]) -> tuple[list[Record], int]:
    """Those that the table does not have yet, each once, and the key for the first of them."""
    by_id = {rows.uuid_bytes(record.id): record for record in records}
    for some in in_parts(list(by_id)):
        query = f"SELECT id FROM {table.name} WHERE id IN ({', '.join('?' * len(some))})"
        for known in connection.exec_driver_sql(query, tuple(some)).scalars():
            del by_id[known]
    return list(by_id.values()), _next_key(connection, table)


def _next_key(connection: Connection, table: Table) -> int:
    return (connection.execute(select(func.max(table.c.key))).scalar() or 0) + 1


def _keys_of(connection: Connection, wanted: Iterable[str]) -> dict[str, int]:
    """The keys of these texts, which are put into the table where they are not in it."""
    table = tables.texts
    digests = {text: _digest(text) for text in wanted}
    known: dict[bytes, int] = {}
    for some in in_parts(list(digests.values())):
        query = select(table.c.digest, table.c.key).where(table.c.digest.in_(some))
        known |= {row.digest: row.key for row in connection.execute(query)}
    fresh = {digest: text for text, digest in digests.items() if digest not in known}
    new = [
        (key, digest, rows.storable(text))
        for key, (digest, text) in enumerate(fresh.items(), _next_key(connection, table))
    ]
    insert_rows(connection, table, new)
    known |= {digest: key for key, digest, _ in new}
    return {text: known[digest] for text, digest in digests.items()}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


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
    key = connection.execute(select(tables.texts.c.key).where(tables.texts.c.digest == _digest(value))).scalar()
    return false() if key is None else column == key
