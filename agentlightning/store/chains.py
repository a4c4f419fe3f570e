"""Contents cut into blocks, so that what begins alike is stored and sent once.

The name of a block is made from the name of the block before it and its own bytes, as prefix caches do. So a name
stands for everything up to the end of its block, and it does not matter which process, host or order contents come in.

What is shorter than `FIRST` is not cut: finding out that it is shared would cost more than it saves. The blocks after
the first are shorter, since on average half a block of each content is not shared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any, AnyStr, Generic, overload

from agentlightning.common_prefix import common_length
from agentlightning.generation import Generation
from agentlightning.store.rows import bytes_of

__all__ = ["FIRST", "IDS", "NAME_BYTES", "NEXT", "TEXTS", "Chain", "Kind", "Prompt", "Recent"]

FIRST, NEXT = 4096, 1024
"""Lengths of the first block and of each that follows: bytes of token ids as int32, characters of a text."""
NAME_BYTES = 16
# Of a block of a text: what it becomes is bounded before it is looked at.
MOST_BYTES = 4 * FIRST + 1
MOST_BLOCKS = 1 << 15
"""Blocks of one content in a message: of eight million ids."""
RECENT_BLOCKS = 1 << 15
RECENT_LENGTH = 32 << 20


@dataclass(slots=True)
class Chain(Generic[AnyStr]):
    """A content, cut.

    Attributes:
        rest: what follows the last block.
        blocks: its blocks as bytes: all of them, or those after the block `after`.
        names: the names of these.
        after: name of a block that the store is assumed to have; None where these are all.
        after_key: the key that it is assumed to have there; 0 for an unknown one.
    """

    rest: AnyStr
    blocks: Sequence[bytes] = ()
    names: Sequence[bytes] = ()
    after: bytes | None = None
    after_key: int = 0

    @property
    def last(self) -> bytes | None:
        """Name of the last block; None for a content without blocks."""
        return self.names[-1] if self.names else self.after

    def continued(self, known: Container[bytes], recent: Recent) -> Chain[AnyStr]:
        """Return the chain as a continuation of its last known block.

        Args:
            known: names of blocks that are known without their keys.
            recent: blocks that are known with their keys.
        """
        for position in range(len(self.names), 0, -1):
            name = self.names[position - 1]
            if (key := recent.get(name)) or name in known:
                return Chain(self.rest, self.blocks[position:], self.names[position:], name, key or 0)
        return self


class _Slices(Sequence[bytes], Generic[AnyStr]):
    """The blocks of a content, each copied when it is asked for: most of a long prompt is known already."""

    def __init__(self, content: AnyStr, count: int, encode: Callable[[AnyStr], bytes]) -> None:
        self._content = content
        self._count = count
        self._encode = encode

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> bytes: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[bytes]: ...

    def __getitem__(self, at: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(self._count))]
        at = range(self._count)[at]
        return self._encode(self._content[_end(at) : _end(at + 1)])


def _end(count: int) -> int:
    """Return where so many blocks end."""
    return FIRST + (count - 1) * NEXT if count else 0


def _count(length: int) -> int:
    """Return how many blocks a length has room for."""
    return 1 + (length - FIRST) // NEXT if length >= FIRST else 0


class Kind(Generic[AnyStr]):
    """A kind of content, whose blocks are shared only with those of its kind.

    Args:
        seed: a byte with which the names of its blocks begin, and which stands for the block before the first.
        encode: makes bytes of a part of a content.
        measure: returns the length of bytes as `FIRST` and `NEXT` count it; raises ValueError for what is no content.
        pack, unpack: shorten a block for the database, and restore it.
    """

    def __init__(
        self,
        seed: bytes,
        encode: Callable[[AnyStr], bytes],
        measure: Callable[[bytes], int],
        pack: Callable[[bytes], bytes],
        unpack: Callable[[bytes], bytes],
    ) -> None:
        self.seed = seed
        self._encode = encode
        self._measure = measure
        self.pack = pack
        self.unpack = unpack

    def cut(self, content: AnyStr, before: AnyStr | None = None, names: Sequence[bytes] = ()) -> Chain[AnyStr]:
        """Cut a content into blocks and the rest.

        Args:
            before: another content, which may begin alike: what they share is not named again.
            names: of the blocks of that one.
        """
        count = _count(len(content))
        if not count:
            return Chain(content)
        blocks = _Slices(content, count, self._encode)
        shared = 0 if before is None else min(_count(common_length(content, before)), len(names))
        known = names[:shared]
        new = self.names((blocks[at] for at in range(shared, count)), known[-1] if known else None)
        return Chain(content[_end(count) :], blocks, [*known, *new])

    def blocks_of(self, packed: Sequence[bytes], *, is_first: bool) -> list[bytes]:
        """Unpack blocks that follow each other.

        Args:
            is_first: the first of them is the first of its content.

        Raises:
            ValueError: one is longer or shorter than blocks are cut.
        """
        if len(packed) > MOST_BLOCKS:
            raise ValueError(f"{len(packed)} blocks, which is more than {MOST_BLOCKS}")
        blocks: list[bytes] = []
        for position, each in enumerate(packed):
            block = self.unpack(each)
            wanted = FIRST if is_first and not position else NEXT
            if (length := self._measure(block)) != wanted:
                raise ValueError(f"block {position} has a length of {length}, not {wanted}")
            blocks.append(block)
        return blocks

    def check_rest(self, rest: AnyStr, *, is_whole: bool) -> None:
        """Raise ValueError for a rest that is longer than what is not cut, or cannot be one.

        Args:
            is_whole: it follows no block.
        """
        if len(rest) >= (FIRST if is_whole else NEXT):
            raise ValueError(f"what follows the last block has a length of {len(rest)}, which makes another block")
        self._measure(self._encode(rest))

    def names(self, blocks: Iterable[bytes], after: bytes | None = None) -> Iterator[bytes]:
        """Name blocks that follow each other, the first of them the block `after`."""
        name = after or self.seed
        for block in blocks:
            name = self.seed + sha256(name + block).digest()[: NAME_BYTES - 1]
            yield name


class Recent:
    """Blocks and contents that this process used lately. Safe for several threads.

    The key of a block is an assumption: its transaction may have been rolled back, or the block deleted since. So the
    store looks at each that is used.
    """

    def __init__(self, blocks: int = RECENT_BLOCKS, length: int = RECENT_LENGTH) -> None:
        self._limit = blocks
        self._length = length
        self._new: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._lock = Lock()
        self._latest: dict[tuple[bytes, Any], tuple[Any, Sequence[bytes]]] = {}
        self._length_of_latest = 0

    def cut(self, kind: Kind[AnyStr], content: AnyStr, conversation: Any) -> Chain[AnyStr]:
        """Cut a content, and name only what is new in it.

        That is what follows the part that it shares with the latest content of its conversation, or of any with the
        same first block, such as a system prompt.
        """
        if len(content) < FIRST:
            return Chain(content)
        places = (kind.seed, conversation), (kind.seed, hash(content[:FIRST]))
        nothing = content[:0], ()
        with self._lock:
            before, names = self._latest.get(places[0]) or self._latest.get(places[1]) or nothing
        chain = kind.cut(content, before, names)
        with self._lock:
            for place in places:
                self._length_of_latest += len(content) - len(self._latest.pop(place, nothing)[0])
                self._latest[place] = content, chain.names
            while self._length_of_latest > self._length:
                self._length_of_latest -= len(self._latest.pop(next(iter(self._latest)))[0])
        return chain

    def get(self, name: bytes) -> int | None:
        """Return the key that a block is assumed to have."""
        key = self._new.get(name)
        if key is None and (key := self._old.get(name)) is not None:
            self.put(name, key)
        return key

    def put(self, name: bytes, key: int) -> None:
        """Keep the key of a block, at least until as many others as the limit have been used."""
        if len(self._new) >= self._limit:
            self._old, self._new = self._new, {}
        self._new[name] = key


def _pack_ids(ids: bytes) -> bytes:
    """Leave out the fourth byte of each id, which is 0 for every vocabulary of less than 16 million.

    The result is never a multiple of four bytes long, so that it is told apart from ids that cannot be packed.
    """
    if ids[3::4].count(0) * 4 != len(ids):
        return ids
    packed = bytearray(len(ids) * 3 // 4)
    for byte in range(3):
        packed[byte::3] = ids[byte::4]
    if len(packed) % 4 == 0:
        packed.append(0)
    return bytes(packed)


def _unpack_ids(packed: bytes) -> bytes:
    if len(packed) % 4 == 0:
        return packed
    count = len(packed) // 3
    ids = bytearray(4 * count)
    for byte in range(3):
        ids[byte::4] = packed[byte : 3 * count : 3]
    return bytes(ids)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _unchanged(block: bytes) -> bytes:
    return block


def _pack_text(text: bytes) -> bytes:
    return zlib.compress(text, 1)


def _unpack_text(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"a block of a text is not compressed by zlib: {error}") from error


def _bytes_of_ids(ids: bytes) -> int:
    if len(ids) % 4:
        raise ValueError(f"{len(ids)} bytes are no token ids of four bytes each")
    return len(ids)


def _characters(text: bytes) -> int:
    return len(text.decode())


IDS: Kind[bytes] = Kind(b"i", _unchanged, _bytes_of_ids, _pack_ids, _unpack_ids)
"""Token ids, as bytes of little-endian int32."""
TEXTS: Kind[str] = Kind(b"t", _encoded, _characters, _pack_text, _unpack_text)
"""Texts. Halves of surrogate pairs become question marks, as in `rows.storable`."""


@dataclass(slots=True)
class Prompt:
    """A prompt's ids and text, cut into blocks; None where they are unknown."""

    ids: Chain[bytes] | None
    text: Chain[str] | None

    @classmethod
    def of(cls, generation: Generation, recent: Recent) -> Prompt:
        """Cut the prompt of a generation."""
        conversation = generation.rollout_id, generation.attempt_id, generation.session_id
        ids, text = bytes_of(generation.prompt_token_ids), generation.prompt_text
        return cls(
            None if ids is None else recent.cut(IDS, ids, conversation),
            None if text is None else recent.cut(TEXTS, text, conversation),
        )
