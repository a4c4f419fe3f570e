"""Contents cut into blocks, so that what begins alike is stored and sent once.

The name of a block is made from the name of the block before it and its own bytes, as prefix caches do. So a name
stands for everything up to the end of its block, and it does not matter which process, host or order contents come in.

What is shorter than `FIRST` is not cut: finding out that it is shared would cost more than it saves. The blocks after
the first are shorter, since on average half a block of each content is not shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import AnyStr, Generic

from agentlightning.generation import Generation
from agentlightning.store.rows import bytes_of

__all__ = ["FIRST", "IDS", "NAME_BYTES", "NEXT", "TEXTS", "Chain", "Kind", "Prompt", "Recent"]

FIRST, NEXT = 4096, 1024
"""Lengths of the first block and of each that follows: bytes of token ids as int32, characters of a text."""
NAME_BYTES = 16
RECENT_BLOCKS = 1 << 15


@dataclass(slots=True)
class Chain(Generic[AnyStr]):
    """A content, cut.

    Attributes:
        rest: what follows the last block.
        blocks: its blocks as bytes: all of them, or those after the block `after`.
        names: the names of these.
        after: name of a block that the store is assumed to have; None where these are all.
    """

    rest: AnyStr
    blocks: Sequence[bytes] = ()
    names: Sequence[bytes] = ()
    after: bytes | None = None

    @property
    def last(self) -> bytes | None:
        """Name of the last block; None for a content without blocks."""
        return self.names[-1] if self.names else self.after


class Recent:
    """Keys of the blocks that this process used lately, by their names. Safe for several threads.

    An entry is an assumption: its transaction may have been rolled back, or the block deleted since.
    """

    def __init__(self, limit: int = RECENT_BLOCKS) -> None:
        self._limit = limit
        self._new: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

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


class Kind(Generic[AnyStr]):
    """A kind of content, whose blocks are shared only with those of its kind.

    Args:
        seed: stands in a name for the block before the first.
        encode: makes bytes of a part of a content.
        pack, unpack: shorten a block for the database, and restore it.
    """

    def __init__(
        self,
        seed: bytes,
        encode: Callable[[AnyStr], bytes],
        pack: Callable[[bytes], bytes],
        unpack: Callable[[bytes], bytes],
    ) -> None:
        self._seed = seed
        self._encode = encode
        self.pack = pack
        self.unpack = unpack

    def cut(self, content: AnyStr) -> Chain[AnyStr]:
        """Cut a content into blocks and the rest."""
        if len(content) < FIRST:
            return Chain(content)
        end = FIRST + (len(content) - FIRST) // NEXT * NEXT
        blocks = [self._encode(content[:FIRST])]
        blocks += [self._encode(content[start : start + NEXT]) for start in range(FIRST, end, NEXT)]
        return Chain(content[end:], blocks, [*self.names(blocks)])

    def names(self, blocks: Iterable[bytes], after: bytes | None = None) -> Iterator[bytes]:
        """Name blocks that follow each other, the first of them the block `after`."""
        name = after or self._seed
        for block in blocks:
            name = sha256(name + block).digest()[:NAME_BYTES]
            yield name


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


IDS: Kind[bytes] = Kind(b"ids", _unchanged, _pack_ids, _unpack_ids)
"""Token ids, as bytes of little-endian int32."""
TEXTS: Kind[str] = Kind(b"text", _encoded, _unchanged, _unchanged)
"""Texts. Halves of surrogate pairs become question marks, as in `rows.storable`."""


@dataclass(slots=True)
class Prompt:
    """A prompt's ids and text, cut into blocks; None where they are unknown."""

    ids: Chain[bytes] | None
    text: Chain[str] | None

    @classmethod
    def of(cls, generation: Generation) -> Prompt:
        """Cut the prompt of a generation."""
        ids, text = bytes_of(generation.prompt_token_ids), generation.prompt_text
        return cls(None if ids is None else IDS.cut(ids), None if text is None else TEXTS.cut(text))
