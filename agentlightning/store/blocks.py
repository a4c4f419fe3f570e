"""The blocks of prompts in a database. The caller owns the transaction.

A block is found by the block before it and its name. New blocks follow new ones, so that the index grows at its end;
an index on the names alone would be written at a random page for each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, AnyStr, NamedTuple

from sqlalchemy import Connection

from agentlightning.errors import StoreError
from agentlightning.store import tables
from agentlightning.store.chains import Chain, Kind, Recent
from agentlightning.store.database import fetch, in_parts, insert_rows, is_single_writer, next_keys

__all__ = ["RECENT", "Lacking", "Stored", "add", "contents", "keys_of", "recent_of"]

RECENT = "recent_blocks"
"""The execution option under which a connection has its database's `Recent`."""

# With each block, those before it, once: the contents of a conversation share nearly all of theirs.
_WITH_ANCESTORS = """
    WITH RECURSIVE chain(key, parent) AS (
        SELECT key, parent FROM blocks WHERE key IN ({})
        UNION
        SELECT blocks.key, blocks.parent FROM chain JOIN blocks ON blocks.key = chain.parent
    )
    SELECT blocks.key, blocks.parent, blocks.body FROM blocks JOIN chain ON blocks.key = chain.key
"""

# A join: SQLite reads the whole table for (parent, name) IN (VALUES ...).
_CHILDREN = """
    WITH wanted(parent, name) AS (VALUES {})
    SELECT blocks.key, blocks.depth, blocks.name
    FROM wanted CROSS JOIN blocks WHERE blocks.parent = wanted.parent AND blocks.name = wanted.name
"""

logger = logging.getLogger("agentlightning.store")


class Lacking(StoreError):
    """Contents that continue blocks which the store does not have, or has no longer.

    Attributes:
        names: of those blocks.
    """

    def __init__(self, names: frozenset[bytes]) -> None:
        super().__init__(f"the store lacks {len(names)} blocks")
        self.names = names


class Stored(NamedTuple):
    """Place of a content's blocks.

    Attributes:
        key: of the last one; 0 where there are none.
        depth: how many they are.
    """

    key: int
    depth: int


NONE = Stored(0, 0)


def add(connection: Connection, kind: Kind[AnyStr], chains: Sequence[Chain[AnyStr]]) -> list[Stored]:
    """Store the blocks of contents, each once, and tell where those of each content are.

    Raises:
        Lacking: blocks that contents continue are not there.
    """
    cut = [chain for chain in chains if chain.last is not None]
    if not cut:
        return [NONE] * len(chains)
    recent = recent_of(connection)
    known = _assumed(connection, recent, cut)
    _check(cut, known)
    walks = [_Walk(chain, known) for chain in cut]
    _find_more(connection, walks, known)
    _add_new(connection, walks, known, kind.pack)
    for walk in walks:
        for name in walk.names[walk.start :]:
            recent.put(name, known[name].key)
    return [NONE if chain.last is None else known[chain.last] for chain in chains]


def recent_of(connection: Connection) -> Recent:
    """Return what this process used lately of the connection's database."""
    return connection.get_execution_options()[RECENT]


def keys_of(connection: Connection, chain: Chain[Any] | None) -> list[int]:
    """Return the keys that the blocks of a chain, which was added, are assumed to have; 0 for an unknown one."""
    recent = recent_of(connection)
    return [recent.get(name) or 0 for name in chain.names] if chain else []


def contents(connection: Connection, kind: Kind[Any], keys: Iterable[int | None]) -> dict[int | None, bytes]:
    """Read contents up to the blocks with these keys. One of which a block is missing is left out, and logged."""
    wanted = sorted({key for key in keys if key is not None})
    parents: dict[int, int] = {}
    blocks: dict[int, bytes] = {}
    for some in in_parts(wanted):
        for key, parent, body in fetch(connection, _WITH_ANCESTORS.format(", ".join("?" * len(some))), some):
            try:
                parents[key], blocks[key] = parent, kind.unpack(bytes(body))
            except ValueError:
                logger.exception("the store is damaged: block %d cannot be read", key)
    found: dict[int | None, bytes] = {}
    # Ascending, so that what a content continues is put together before it.
    for key in wanted:
        parts, at = list[bytes](), key
        while at in blocks and at not in found:
            parts.append(blocks[at])
            at = parents[at]
        if at != NONE.key and at not in found:
            logger.error("the store is damaged: block %d, which block %d continues, is missing", at, key)
            continue
        found[key] = b"".join((found.get(at, b""), *reversed(parts)))
    return found


class _Walk:
    """The way along the blocks of a content, as far as the store has them.

    Attributes:
        names, blocks: those of the content.
        start: the first block that was not known at the beginning.
        position: the first block that is not known now.
        before: the block before that one; None while it is not known either.
    """

    def __init__(self, chain: Chain[Any], known: Mapping[bytes, Stored]) -> None:
        self.names = chain.names
        self.blocks = chain.blocks
        self.start = next((at for at in range(len(chain.names), 0, -1) if chain.names[at - 1] in known), 0)
        self.position = self.start
        self._after = chain.names[self.start - 1] if self.start else chain.after
        self.before = self.begin(known)

    def begin(self, known: Mapping[bytes, Stored]) -> Stored | None:
        """Return the block before the first that was not known at the beginning, if it is known."""
        return NONE if self._after is None else known.get(self._after)

    def go_on(self, known: Mapping[bytes, Stored]) -> bool:
        """Go on over known blocks; tell whether that was possible, and others are left."""
        moved = self.before is None
        if self.before is None:
            self.before = self.begin(known)
        while self.before and self.position < len(self.names):
            if (found := known.get(self.names[self.position])) is None:
                break
            self.before = found
            self.position += 1
            moved = True
        return moved and self.before is not None and self.position < len(self.names)


def _assumed(connection: Connection, recent: Recent, chains: Iterable[Chain[Any]]) -> dict[bytes, Stored]:
    """Find for each chain the last block that this process knows, unless the store does not have it any more."""
    assumed: dict[int, bytes] = {}
    for chain in chains:
        for name in reversed(chain.names):
            if key := recent.get(name):
                assumed[key] = name
                break
        # In any case: the other may have been deleted.
        if chain.after is not None and (key := chain.after_key or recent.get(chain.after)):
            assumed[key] = chain.after
    found: dict[bytes, Stored] = {}
    for some in in_parts([*assumed]):
        query = f"SELECT key, depth, name FROM blocks WHERE key IN ({', '.join('?' * len(some))})"
        for key, depth, name in fetch(connection, query, some):
            if assumed[key] == bytes(name):
                found[bytes(name)] = Stored(key, depth)
    return found


def _check(chains: Sequence[Chain[Any]], known: Mapping[bytes, Stored]) -> None:
    """Raise `Lacking` unless each block that a chain continues is known, or is one of those that come before it."""
    if all(chain.after is None for chain in chains):
        return
    introduced: set[bytes] = set()
    lacking: set[bytes] = set()
    for chain in chains:
        if chain.after is not None and chain.after not in known and chain.after not in introduced:
            lacking.add(chain.after)
        else:
            introduced.update(chain.names)
    if lacking:
        raise Lacking(frozenset(lacking))


def _find_more(connection: Connection, walks: Sequence[_Walk], known: dict[bytes, Stored]) -> None:
    """Go on along each content over the blocks that the store has, all of them one block at a time."""
    waiting = [walk for walk in walks if walk.before is not None and walk.position < len(walk.names)]
    while waiting:
        wanted = list({(walk.before.key, walk.names[walk.position]) for walk in waiting if walk.before is not None})
        found = len(known)
        for some in in_parts(wanted, variables=2):
            query = _CHILDREN.format(", ".join(["(?, ?)"] * len(some)))
            for key, depth, name in fetch(connection, query, [value for pair in some for value in pair]):
                known[bytes(name)] = Stored(key, depth)
        if len(known) == found:
            return
        waiting = [walk for walk in walks if walk.go_on(known)]


def _add_new(
    connection: Connection, walks: Sequence[_Walk], known: dict[bytes, Stored], pack: Callable[[bytes], bytes]
) -> None:
    # In the order of the chains, so that a parent has a lower key than its children.
    new = dict.fromkeys(name for walk in walks for name in walk.names[walk.position :] if name not in known)
    keys = iter(next_keys(connection, tables.blocks, len(new)))
    rows: list[tuple[int, int, int, bytes, bytes]] = []
    for walk in walks:
        before = walk.before or walk.begin(known) or NONE
        for position in range(walk.position, len(walk.names)):
            name = walk.names[position]
            found = known.get(name)
            if found is None:
                found = known[name] = Stored(next(keys), before.depth + 1)
                rows.append((found.key, found.depth, before.key, name, pack(walk.blocks[position])))
            before = found
    if not is_single_writer(connection):
        # Two writers that insert the same blocks in different orders would deadlock.
        rows.sort(key=lambda row: row[3])
    insert_rows(connection, tables.blocks, rows)
