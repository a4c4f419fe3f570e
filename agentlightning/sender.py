"""A process that records: its model's vocabulary, and how far it has written. Knows no vLLM."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from agentlightning.generation import new_id

__all__ = ["ID_LIMIT", "PACKED_LIMIT", "LostCalls", "Progress", "Sender", "StoreTime", "UnfinishedCalls", "Vocabulary"]

PACKED_LIMIT = 16 << 20
"""The most bytes of a compressed vocabulary. The largest known ones have 2 MiB."""

ID_LIMIT = 1 << 22
"""The highest plausible id: a tokenizer with higher ones is broken, or not a tokenizer."""

# The most bytes of a vocabulary as JSON: no known one has a tenth of it.
_UNPACKED_LIMIT = 64 << 20
# Encoded at once: few enough that another thread never waits long for the interpreter.
_TOKENS_AT_ONCE = 2000


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, by id.

    Attributes:
        tokens: each id's token, as the tokenizer has it (`Ġthe`, `▁the`, `<0x0A>`); None for an unused id.
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
        """Return its JSON, compressed by zlib."""
        packer = zlib.compressobj(1)
        return b"".join([*(packer.compress(part) for part in self._json()), packer.flush()])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Vocabulary:
        """Return the vocabulary that `to_bytes` has encoded.

        Raises:
            ValueError: this is not a vocabulary, is truncated, or decompresses to too much.
        """
        unpacker = zlib.decompressobj()
        try:
            body = unpacker.decompress(packed, _UNPACKED_LIMIT)
        except zlib.error as error:
            raise ValueError(f"the vocabulary cannot be decompressed: {error}") from error
        if unpacker.unconsumed_tail:
            raise ValueError(f"the vocabulary decompresses to more than {_UNPACKED_LIMIT >> 20} MiB")
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("the vocabulary is truncated, or followed by other data")
        # An empty object is two bytes of JSON, and a hundred in memory.
        if body.count(b",") > 2 * ID_LIMIT or body.count(b"{") + body.count(b"[") > ID_LIMIT // 4:
            raise ValueError("the vocabulary contains more than a list of tokens")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the vocabulary is not JSON: {error}") from error
        if (
            not isinstance(found, dict)
            or found.keys() != {"special", "tokens"}
            or not all(map(_is_list, found.values()))
        ):
            raise ValueError("the vocabulary is not an object with the lists special and tokens")
        special, tokens = found["special"], found["tokens"]
        if len(tokens) > ID_LIMIT:
            raise ValueError(f"the vocabulary has more than {ID_LIMIT} tokens")
        if not all(token is None or isinstance(token, str) for token in tokens):
            raise ValueError("the vocabulary has a token that is not a string")
        if not all(type(each) is int and 0 <= each < len(tokens) for each in special):
            raise ValueError("the vocabulary has a special id that is not one of its ids")
        return cls(tokens, frozenset(special))

    def _json(self) -> Iterator[bytes]:
        """Yield its JSON in parts, in one canonical form, so that equal vocabularies have equal digests."""
        yield b'{"special":' + _compact(sorted(self.special)) + b',"tokens":['
        for start in range(0, len(self.tokens), _TOKENS_AT_ONCE):
            some = list(self.tokens[start : start + _TOKENS_AT_ONCE])
            yield (b"," if start else b"") + _compact(some)[1:-1]
        yield b"]}"


@dataclass(frozen=True, kw_only=True)
class Sender:
    """A process that records. What is unknown is None.

    Attributes:
        id: a UUIDv7. Host and process number do not identify a process: both may be used again by another.
        host, pid: where it runs.
        started_at: nanoseconds since the epoch.
        version: the version of agentlightning.
        vllm: the version of vLLM.
        model: the name that its model is served under.
        vocabulary: the vocabulary of that model.
    """

    id: str = field(default_factory=new_id)
    host: str
    pid: int
    started_at: int
    version: str
    vllm: str | None = None
    model: str | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class UnfinishedCalls:
    """Generations of one attempt that a process has begun and not ended.

    Attributes:
        rollout_id, attempt_id: where they belong, as their calls said; None where these named none.
        count: number of generations.
    """

    rollout_id: str | None
    attempt_id: str | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LostCalls:
    """Generations of one attempt that could not be stored.

    Attributes:
        id: a UUIDv7.
        rollout_id, attempt_id: where they belong, as their calls said; None where these named none.
        count: number of generations.
        reason: one of `agentlightning.recorder.LOST`.
    """

    id: str = field(default_factory=new_id)
    rollout_id: str | None
    attempt_id: str | None
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class StoreTime:
    """The time that a store answered with, in nanoseconds since the epoch.

    Attributes:
        time: by the store's clock, read before it answered.
        received_at: by the sender's clock, read after the answer had arrived.
    """

    time: int
    received_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of a process: how far it has written what it records. Times are nanoseconds by its own clock.

    Attributes:
        watermark: every generation that had ended by then is stored, or counted as lost.
        store_time: the store's last answer to such a report; None for the first report to a store.
        under_way: the generations that were unfinished at the watermark.
        lost: losses that the store has not confirmed yet.
        has_ended: the process writes nothing after this.
    """

    watermark: int
    store_time: StoreTime | None = None
    under_way: Sequence[UnfinishedCalls] = ()
    lost: Sequence[LostCalls] = ()
    has_ended: bool = False


def _compact(value: Any) -> bytes:
    # ASCII, since a token may contain half of a surrogate pair.
    return json.dumps(value, separators=(",", ":")).encode()


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
