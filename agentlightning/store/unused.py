"""Deletion of what no row refers to any more: blocks of prompts, repeated texts, senders and vocabularies.

It is deleted in write transactions that have no other beside them (`Database.writing(alone=True)`): a writer that has
found a block or a text refers to it before its own transaction ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from sqlalchemy import Connection

from agentlightning.store.database import Database, fetch, in_parts, run
from agentlightning.store.rows import GENERATION

__all__ = ["BlockUse", "delete_keys", "sweep", "unused_blocks"]

KEYS_AT_ONCE = 5_000
DELETED_AT_ONCE = 500
FEW_ROWS = 2_000
SENDER_KEPT = 7 * 24 * 3600 * 10**9
"""Nanoseconds for which a sender without generations is kept after it was last seen: it may only be idle."""

# With each block, those before it.
_WITH_ANCESTORS = """
    WITH RECURSIVE chain(key, parent) AS (
        SELECT key, parent FROM blocks WHERE key IN ({})
        UNION
        SELECT blocks.key, blocks.parent FROM chain JOIN blocks ON blocks.key = chain.parent
    )
    SELECT key, parent FROM chain
"""
# A block that a million prompts share has a million children: they are counted only as far as that can matter.
_USES = """
    SELECT key, length(body),
        (SELECT count(*) FROM (SELECT 1 FROM generations WHERE ids_block = blocks.key LIMIT {most}) AS counted)
        + (SELECT count(*) FROM (SELECT 1 FROM generations WHERE text_block = blocks.key LIMIT {most}) AS counted),
        (SELECT count(*) FROM (SELECT 1 FROM blocks AS child WHERE child.parent = blocks.key LIMIT 2) AS counted)
    FROM blocks WHERE key IN ({keys})
"""
_CHILDREN = "SELECT count(*) FROM (SELECT 1 FROM blocks WHERE parent = ? LIMIT ?) AS counted"
_ORPHANS = """
    SELECT key FROM blocks WHERE key >= ? AND key < ?
    AND NOT EXISTS (SELECT 1 FROM generations WHERE ids_block = blocks.key)
    AND NOT EXISTS (SELECT 1 FROM generations WHERE text_block = blocks.key)
    AND NOT EXISTS (SELECT 1 FROM blocks AS child WHERE child.parent = blocks.key)
"""


@dataclass(slots=True)
class BlockUse:
    """A block and what refers to it.

    Attributes:
        parent: key of the block before it; 0 where there is none.
        size: bytes of its body.
        generations: how many name it as their last block, counted only up to one more than are going.
        children: how many blocks continue it, counted only up to two.
    """

    parent: int
    size: int = 0
    generations: int = 0
    children: int = 0


def unused_blocks(
    connection: Connection, last: Iterable[int], going: Mapping[int, int] | None = None
) -> dict[int, BlockUse]:
    """Find the blocks of contents that nothing refers to any more, later ones first.

    Args:
        last: keys of the last blocks of contents whose generations are deleted, or are going to be.
        going: how many of the generations that name a block are going to be deleted; none where they are already.
    """
    keys = {*last}
    uses = _uses(connection, keys, going or {})
    # Backwards, because the children of a block have higher keys than it.
    waiting = [-key for key in keys if key in uses]
    heapify(waiting)
    gone: dict[int, BlockUse] = {}
    lost = Counter[int]()
    while waiting:
        key = -heappop(waiting)
        use = uses[key]
        if key in gone or use.generations > (going or {}).get(key, 0) or not _has_lost_all(connection, key, use, lost):
            continue
        gone[key] = use
        if use.parent:
            lost[use.parent] += 1
            # Its other children have higher keys than it, so that all are counted before it is looked at.
            if lost[use.parent] == 1:
                heappush(waiting, -use.parent)
    return gone


def _uses(connection: Connection, keys: set[int], going: Mapping[int, int]) -> dict[int, BlockUse]:
    """Find blocks, all those before them, and what refers to each."""
    found: dict[int, BlockUse] = {}
    for some in in_parts(sorted(keys)):
        query = _WITH_ANCESTORS.format(", ".join("?" * len(some)))
        found |= {key: BlockUse(parent) for key, parent in fetch(connection, query, some)}
    most = 1 + max(going.values(), default=0)
    for some in in_parts(sorted(found)):
        query = _USES.format(most=most, keys=", ".join("?" * len(some)))
        for key, size, generations, children in fetch(connection, query, some):
            use = found[key]
            use.size, use.generations, use.children = size, generations, children
    return found


def _has_lost_all(connection: Connection, key: int, use: BlockUse, lost: Mapping[int, int]) -> bool:
    """Tell whether all blocks that continue this one are gone."""
    gone = lost.get(key, 0)
    if use.children < 2 or gone < 2:
        return use.children <= gone
    return run(connection, _CHILDREN, (key, gone + 1)).scalar_one() <= gone


def delete_keys(connection: Connection, table: str, keys: Iterable[int], column: str = "key") -> int:
    """Delete the rows with these keys; returns how many there were."""
    deleted = 0
    for some in in_parts([*keys]):
        query = f"DELETE FROM {table} WHERE {column} IN ({', '.join('?' * len(some))})"
        deleted += run(connection, query, some).rowcount
    return deleted


def sweep(database: Database) -> Iterator[Counter[str]]:
    """Delete all that nothing refers to, in short transactions.

    All rows are looked at, since an index that finds those with a text would cost every writer. Beside writers, which
    go on meanwhile.

    Yields:
        After each step what it has deleted, by kind: `blocks`, `texts`, `senders`, `vocabularies`, `bytes`.
    """
    yield from _sweep_blocks(database)
    yield from _sweep_texts(database)


def _sweep_blocks(database: Database) -> Iterator[Counter[str]]:
    """Delete blocks that neither a generation nor a block refers to. A block precedes those that continue it."""
    with database.reading() as connection:
        lowest, end = _lowest(connection, "blocks"), _highest(connection, "blocks") + 1
    while end > lowest:
        start = max(end - KEYS_AT_ONCE, lowest)
        with database.reading() as connection:
            found = run(connection, _ORPHANS, (start, end)).scalars().all()
        for some in in_parts(found):
            with database.writing(alone=True) as connection:
                # Checked again: a writer may have used one meanwhile.
                gone = unused_blocks(connection, some)
                delete_keys(connection, "blocks", gone)
            yield Counter(blocks=len(gone), bytes=sum(use.size for use in gone.values()))
        yield Counter()
        end = start


class _Marks:
    """Keys that rows refer to."""

    def __init__(self, highest: int) -> None:
        self._bits = bytearray(highest // 8 + 1)

    def add(self, keys: Iterable[int | None]) -> None:
        bits = self._bits
        for key in keys:
            # Higher keys are those of texts that are new, which are kept.
            if key is not None and key >> 3 < len(bits):
                bits[key >> 3] |= 1 << (key & 7)

    def __contains__(self, key: int) -> bool:
        return key >> 3 < len(self._bits) and bool(self._bits[key >> 3] & 1 << (key & 7))


class _Marking:
    """Marks the texts and senders that rows refer to.

    First all rows up to the highest keys, in short read transactions. What is written meanwhile has higher keys, and is
    marked in the transaction that deletes.
    """

    def __init__(self, connection: Connection) -> None:
        self.highest = _highest(connection, "texts")
        self.texts = _Marks(self.highest)
        self.senders: set[int] = set()
        self._seen = {table: _lowest(connection, table) - 1 for table in ("generations", "spans")}
        self._ends: dict[str, tuple[int, Any]] = {}
        self.look(connection)

    def look(self, connection: Connection) -> int:
        """Take the rows that are there now as those to be marked; returns how many are not marked yet.

        No other writer may have a transaction: one that has reserved lower keys could write them later.
        """
        self._ends = {table: _end(connection, table) for table in self._seen}
        return sum(self._ends[table][0] - seen for table, seen in self._seen.items())

    def is_valid(self, connection: Connection) -> bool:
        """Tell whether the rows with the highest keys are still there: SQLite gives the keys of deleted ones again."""
        return all(_row_id(connection, table, key) == row_id for table, (key, row_id) in self._ends.items())

    def mark(self, connection: Connection, at_once: int = KEYS_AT_ONCE) -> bool:
        """Mark what some more rows refer to; tell whether there are others."""
        for table, (end, _) in self._ends.items():
            start = self._seen[table]
            if start >= end:
                continue
            stop = min(start + at_once, end)
            between = (start, stop)
            if table == "spans":
                query = "SELECT DISTINCT common_key FROM spans WHERE key > ? AND key <= ?"
                self.texts.add(run(connection, query, between).scalars())
            else:
                columns = ", ".join(("sender_key", *(GENERATION.columns[name] for name in GENERATION.shared)))
                query = f"SELECT {columns} FROM generations WHERE key > ? AND key <= ?"
                senders, *keys = [*zip(*fetch(connection, query, between), strict=True)] or [()]
                self.senders.update(senders)
                for each in keys:
                    self.texts.add({*each})
                query = (
                    "SELECT DISTINCT finish_reason_key FROM choices WHERE generation_key > ? AND generation_key <= ?"
                )
                self.texts.add(run(connection, query, between).scalars())
            self._seen[table] = stop
            return True
        return False


def _highest(connection: Connection, table: str) -> int:
    return run(connection, f"SELECT max(key) FROM {table}", ()).scalar() or 0


def _lowest(connection: Connection, table: str) -> int:
    return run(connection, f"SELECT min(key) FROM {table}", ()).scalar() or 1


def _end(connection: Connection, table: str) -> tuple[int, Any]:
    key = _highest(connection, table)
    return key, _row_id(connection, table, key)


def _row_id(connection: Connection, table: str, key: int) -> Any:
    columns = "id" if table == "generations" else "trace_id, span_id"
    row = run(connection, f"SELECT {columns} FROM {table} WHERE key = ?", (key,)).first()
    return None if row is None else tuple(bytes(each) if table == "generations" else each for each in row)


def _sweep_texts(database: Database) -> Iterator[Counter[str]]:
    with database.writing(alone=True) as connection:
        marking = _Marking(connection)
    while True:
        yield from _mark_all(database, marking)
        with database.writing(alone=True) as connection:
            if not marking.is_valid(connection):
                return
            if marking.look(connection) <= FEW_ROWS:
                break
    yield from _delete_senders(database, marking)
    start = 0
    while True:
        query = "SELECT key FROM texts WHERE key > ? AND key <= ? ORDER BY key LIMIT ?"
        with database.reading() as connection:
            found = run(connection, query, (start, marking.highest, KEYS_AT_ONCE)).scalars().all()
        if not found:
            return
        start = found[-1]
        unmarked = [key for key in found if key not in marking.texts]
        for first in range(0, len(unmarked), DELETED_AT_ONCE):
            with database.writing(alone=True) as connection:
                if not _mark_new(connection, marking):
                    return
                gone = [key for key in unmarked[first : first + DELETED_AT_ONCE] if key not in marking.texts]
                size = _size(connection, gone)
                deleted = delete_keys(connection, "texts", gone)
            yield Counter(texts=deleted, bytes=size)
        yield Counter()


def _mark_all(database: Database, marking: _Marking) -> Iterator[Counter[str]]:
    while True:
        with database.reading() as connection:
            goes_on = marking.mark(connection)
        if not goes_on:
            return
        yield Counter()


def _mark_new(connection: Connection, marking: _Marking) -> bool:
    """Mark what was written since; False where that cannot be told from what was there before."""
    if not marking.is_valid(connection):
        return False
    marking.look(connection)
    while marking.mark(connection):
        pass
    return True


def _delete_senders(database: Database, marking: _Marking) -> Iterator[Counter[str]]:
    """Delete senders without generations that have not been seen for long, and the vocabularies of none.

    One that has lost calls, or did not say that it ends, is kept: rollouts are not complete because of it.
    """
    with database.writing(alone=True) as connection:
        if not _mark_new(connection, marking):
            return
        before = time.time_ns() - SENDER_KEPT
        query = """
            SELECT key FROM senders WHERE seen_at < ? AND key NOT IN (SELECT sender_key FROM lost_calls)
            AND key NOT IN (SELECT sender_key FROM watermarks WHERE NOT has_ended)
        """
        old = run(connection, query, (before,)).scalars().all()
        gone = [key for key in old if key not in marking.senders]
        for table in ("sender_minutes", "watermarks"):
            delete_keys(connection, table, gone, "sender_key")
        deleted = delete_keys(connection, "senders", gone)
        unknown = "vocabularies WHERE NOT EXISTS (SELECT 1 FROM senders WHERE senders.digest = vocabularies.digest)"
        size = run(connection, f"SELECT coalesce(sum(length(body)), 0) FROM {unknown}", ()).scalar_one()
        vocabularies = run(connection, f"DELETE FROM {unknown}", ()).rowcount
    yield Counter(senders=deleted, vocabularies=vocabularies, bytes=int(size))


def _size(connection: Connection, keys: Sequence[int]) -> int:
    size = 0
    for some in in_parts(keys):
        query = f"SELECT coalesce(sum(length(text)), 0) FROM texts WHERE key IN ({', '.join('?' * len(some))})"
        size += int(run(connection, query, some).scalar_one())
    return size
