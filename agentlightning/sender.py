"""Who records: a process of a vLLM server, and the vocabulary of its model. Knows no vLLM."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from agentlightning.generation import new_id

__all__ = ["ID_LIMIT", "PACKED_LIMIT", "Sender", "Vocabulary"]

PACKED_LIMIT = 16 << 20
"""Bytes of a vocabulary as it is sent and kept. The largest that there are have 2 MiB."""

ID_LIMIT = 1 << 22
"""A tokenizer that gives out higher ids than this is broken, or something else than a tokenizer."""

# As JSON: no vocabulary has a tenth of it.
_UNPACKED_LIMIT = 64 << 20
# So many at a time that another thread never waits for long until it may run.
_TOKENS_AT_ONCE = 2000


@dataclass(frozen=True)
class Vocabulary:
    """What the token ids of a model stand for.

    Attributes:
        tokens: each id's token, as the tokenizer has it (`Ġthe`, `▁the`, `<0x0A>`); None where an id stands for none.
        special: the ids of special tokens.
    """

    tokens: Sequence[str | None]
    special: frozenset[int] = frozenset()

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of its JSON: 32 bytes, the same on every machine."""
        found = hashlib.sha256()
        for part in self._json():
            found.update(part)
        return found.digest()

    def to_bytes(self) -> bytes:
        """Its JSON, packed with zlib."""
        packer = zlib.compressobj(1)
        return b"".join([*(packer.compress(part) for part in self._json()), packer.flush()])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Vocabulary:
        """What `to_bytes` made this of.

        Raises:
            ValueError: it is no vocabulary, is cut off, or becomes too large.
        """
        unpacker = zlib.decompressobj()
        try:
            body = unpacker.decompress(packed, _UNPACKED_LIMIT)
        except zlib.error as error:
            raise ValueError(f"a vocabulary that cannot be unpacked: {error}") from error
        if unpacker.unconsumed_tail:
            raise ValueError(f"a vocabulary that becomes larger than {_UNPACKED_LIMIT >> 20} MiB")
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("a vocabulary that is cut off, or has something behind its end")
        # An empty object is two bytes, and becomes a hundred.
        if body.count(b",") > 2 * ID_LIMIT or body.count(b"{") + body.count(b"[") > ID_LIMIT // 4:
            raise ValueError("a vocabulary that has more in it than tokens")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a vocabulary that is no JSON: {error}") from error
        if (
            not isinstance(found, dict)
            or found.keys() != {"special", "tokens"}
            or not all(map(_is_list, found.values()))
        ):
            raise ValueError("a vocabulary that has something else than special ids and tokens")
        special, tokens = found["special"], found["tokens"]
        if len(tokens) > ID_LIMIT:
            raise ValueError(f"a vocabulary of more than {ID_LIMIT} tokens")
        if not all(token is None or isinstance(token, str) for token in tokens):
            raise ValueError("a vocabulary with a token that is no text")
        if not all(type(each) is int and 0 <= each < len(tokens) for each in special):
            raise ValueError("a vocabulary with a special id that is none of its ids")
        return cls(tokens, frozenset(special))

    def _json(self) -> Iterator[bytes]:
        """Written in one way only, so that equal vocabularies have one digest."""
        yield b'{"special":' + _compact(sorted(self.special)) + b',"tokens":['
        for start in range(0, len(self.tokens), _TOKENS_AT_ONCE):
            some = list(self.tokens[start : start + _TOKENS_AT_ONCE])
            yield (b"," if start else b"") + _compact(some)[1:-1]
        yield b"]}"


@dataclass(frozen=True, kw_only=True)
class Sender:
    """A process that records. What is unknown is None.

    Attributes:
        id: UUIDv7, its own: the process number, and even the host's name, may be somebody else's next.
        host, pid: where it runs.
        started_at: nanoseconds since the epoch.
        version: of agentlightning.
        vllm: the version of vLLM.
        model: the name that its model is served under.
        vocabulary: what the ids of that model stand for.
    """

    id: str = field(default_factory=new_id)
    host: str
    pid: int
    started_at: int
    version: str
    vllm: str | None = None
    model: str | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False)


def _compact(value: Any) -> bytes:
    # ASCII, since a token may have half of a surrogate pair.
    return json.dumps(value, separators=(",", ":")).encode()


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
