"""Prompts that an older version stored whole become blocks, in short transactions, beside readers and writers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from agentlightning.store import prompts
from agentlightning.store.chains import FIRST, IDS, TEXTS, Prompt
from agentlightning.store.database import Database, fetch, is_single_writer, run
from agentlightning.store.rows import text_of

__all__ = ["Step", "count", "migrate"]

LONGEST_AT_ONCE = 64
SECONDS_AT_ONCE = 0.1
SECONDS_BETWEEN = 0.11
"""Pause after a transaction in SQLite, whose waiting writers try again every 0.1 s (from its source)."""
KEYS_AT_ONCE = 5_000

_IS_WHOLE = "ids_block IS NULL AND text_block IS NULL"
_BODIES = "SELECT id, prompt_token_ids, prompt_text FROM generations WHERE key IN ({})"
_CHANGE = "UPDATE generations SET ids_block = ?, text_block = ?, prompt_token_ids = ?, prompt_text = ? WHERE id = ?"


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a migration.

    Attributes:
        seen: how many keys of generations were looked at.
        migrated: how many generations were changed.
    """

    seen: int
    migrated: int = 0


@dataclass(frozen=True, slots=True)
class _Whole:
    """A generation whose prompt is to be cut, by its id: SQLite gives the keys of deleted rows again."""

    id: bytes
    prompt: Prompt


def count(database: Database) -> int:
    """Count the keys of generations that `migrate` looks at."""
    with database.reading() as connection:
        [(lowest, highest)] = fetch(connection, "SELECT min(key), max(key) FROM generations", ())
    return 0 if highest is None else highest - lowest + 1


def migrate(database: Database) -> Iterator[Step]:
    """Cut the prompts of all generations that are stored whole, and are long enough.

    Yields:
        After each transaction what it has done. Killed in between, the next run continues.
    """
    with database.reading() as connection:
        [(lowest, highest)] = fetch(connection, "SELECT min(key), max(key) FROM generations", ())
    if highest is None:
        return
    last, at_once = lowest - 1, 8
    while last < highest:
        with database.reading() as connection:
            waits = is_single_writer(connection)
            end = min(last + KEYS_AT_ONCE, highest)
            keys = _long(connection, last, end, at_once)
            end = keys[-1] if len(keys) == at_once else end
            found = _cut(connection, keys)
        changed = 0
        if found:
            began = time.monotonic()
            changed = database.write(lambda connection, found=found: _store(connection, found))
            took = time.monotonic() - began
            at_once = max(1, min(LONGEST_AT_ONCE, at_once * 2 if took < SECONDS_AT_ONCE / 2 else at_once // 2))
        yield Step(end - last, changed)
        if found and waits:
            time.sleep(SECONDS_BETWEEN)
        last = end


def _long(connection: Connection, start: int, end: int, limit: int) -> Sequence[int]:
    # PostgreSQL knows the bytes of a text without reading it.
    length = "length" if is_single_writer(connection) else "octet_length"
    query = (
        f"SELECT key FROM generations WHERE key > ? AND key <= ? AND {_IS_WHOLE} AND "
        f"(length(prompt_token_ids) >= {FIRST} OR {length}(prompt_text) >= {FIRST}) ORDER BY key LIMIT ?"
    )
    return run(connection, query, (start, end, limit)).scalars().all()


def _cut(connection: Connection, keys: Sequence[int]) -> list[_Whole]:
    if not keys:
        return []
    found: list[_Whole] = []
    for generation_id, ids, text in fetch(connection, _BODIES.format(", ".join("?" * len(keys))), keys):
        of_ids = None if ids is None else IDS.cut(bytes(ids))
        of_text = None if text is None else TEXTS.cut(text_of(text))
        if any(chain is not None and chain.names for chain in (of_ids, of_text)):
            found.append(_Whole(bytes(generation_id), Prompt(of_ids, of_text)))
    return found


def _store(connection: Connection, found: Sequence[_Whole]) -> int:
    """Store the blocks of prompts that are still stored whole; returns how many these are."""
    query = f"SELECT id FROM generations WHERE {_IS_WHOLE} AND id IN ({', '.join('?' * len(found))})"
    if not is_single_writer(connection):
        # In their order, so that two migrations cannot wait for each other.
        query += " ORDER BY key FOR UPDATE"
    whole = {bytes(each) for each in run(connection, query, [each.id for each in found]).scalars()}
    chosen = [each for each in found if each.id in whole]
    for each, (_, *columns) in zip(chosen, prompts.add_cut(connection, [each.prompt for each in chosen]), strict=True):
        run(connection, _CHANGE, (*columns, each.id))
    return len(chosen)
