"""Conversion of records to rows of the tables, and back.

Records list their fields, with types, once; a field's type says how its column keeps it.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from json.encoder import encode_basestring_ascii
from math import prod
from operator import attrgetter
from typing import Any, TypeVar

from agentlightning.errors import InvalidRecord
from agentlightning.generation import (
    STATUSES,
    VIAS,
    Choice,
    Generation,
    Loss,
    RoutedExperts,
    SamplingMask,
    SharedText,
    Status,
    TopLogprobs,
    Uuid,
    Via,
    record_fields,
)

__all__ = [
    "ARRAYS",
    "CHOICE",
    "GENERATION",
    "LOSS",
    "PACKINGS",
    "Layout",
    "array_of",
    "bytes_of",
    "experts_of",
    "mask_of",
    "storable",
    "text_of",
    "top_of",
    "uuid_bytes",
    "uuid_text",
    "versions_of",
]

Text = TypeVar("Text", str, None)

Values = Mapping[str, Sequence[Any]]
"""The values that each field has in some records."""


Packing = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""A function that packs a value, and one that unpacks it."""
_AS_IT_IS = (None, None)


class Layout:
    """The columns that keep fields of a record.

    Attributes:
        fields: the fields, by name and in order.
        columns: the name of each one's column. That of a `SharedText` has the key of the text.
        shared: the names of the fields that are a `SharedText`.
    """

    def __init__(self, kind: type, without: Sequence[str] = ()) -> None:
        self.fields = {each.name: each for each in record_fields(kind) if each.name not in without}
        self.shared = {name for name, each in self.fields.items() if each.type == SharedText}
        self.columns = {
            name: f"{name.removesuffix('_id')}_key" if name in self.shared else name for name in self.fields
        }
        # Looked up once: the hash of a type takes longer than the packing of a value.
        self._packings = {name: PACKINGS.get(each.type, _AS_IT_IS) for name, each in self.fields.items()}
        self._values_of = attrgetter(*self.fields)
        self._columns_of = attrgetter(*self.columns.values())

    def values_of(self, records: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """Collect the values of each field in records.

        They are converted column by column: to call a function for each value would take as long as SQLite does.
        """
        columns = [*zip(*map(self._values_of, records), strict=True)] or [()] * len(self.fields)
        return dict(zip(self.fields, columns, strict=True))

    def texts_in(self, values: Values) -> set[str | None]:
        """Collect the shared texts among values."""
        return {*chain.from_iterable([values[name] for name in self.shared])}

    def columns_of(self, values: Values, keys: Mapping[str | None, int | None]) -> list[Iterable[Any]]:
        """Convert values of fields to those of their columns.

        Args:
            keys: maps the shared texts to their keys, and None to None.

        Raises:
            ValueError: no store can hold one of them, such as an unknown status.
        """
        return [
            map(keys.__getitem__, values[name]) if name in self.shared else _converted(values[name], pack)
            for name, (pack, _) in self._packings.items()
        ]

    def keys_in(self, found: Sequence[Any]) -> set[int | None]:
        """Collect the keys of shared texts in rows."""
        return {getattr(row, self.columns[name]) for row in found for name in self.shared}

    def records_of(self, found: Sequence[Any], texts: Mapping[int | None, str | None]) -> list[dict[str, Any]]:
        """Convert rows to the fields of records.

        Args:
            texts: maps the keys of shared texts to these, and None to None.
        """
        columns = [*zip(*map(self._columns_of, found), strict=True)] or [()] * len(self.fields)
        values = [
            map(texts.__getitem__, column) if name in self.shared else _converted(column, unpack)
            for (name, (_, unpack)), column in zip(self._packings.items(), columns, strict=True)
        ]
        return [dict(zip(self.fields, each, strict=True)) for each in zip(*values, strict=True)]


def _converted(values: Sequence[Any], convert: Callable[[Any], Any] | None) -> Iterable[Any]:
    if convert is None:
        return values
    return [None if value is None else convert(value) for value in values]


def versions_text(versions: list[tuple[str, int, int]]) -> str:
    """Write the weight versions of a choice as JSON, in less time than `json.dumps`."""
    try:
        spans = [f"[{encode_basestring_ascii(name)}, {start:d}, {end:d}]" for name, start, end in versions]
    except (TypeError, ValueError):
        # A program may have given its weights a number for a name.
        return json.dumps(versions)
    return f"[{', '.join(spans)}]"


def versions_of(found: str | None) -> list[tuple[str, int, int]] | None:
    """Parse the weight versions of a choice."""
    return None if found is None else [tuple(version) for version in json.loads(found)]


def uuid_bytes(text: str) -> bytes:
    """Parse a UUID into its sixteen bytes.

    Raises:
        InvalidRecord: the text is not a UUID as `new_id` writes one; only that form can be restored from the bytes.
    """
    digits = text.replace("-", "")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        found = b""
    if len(text) == 36 and text[8:24:5] == "----" and found.hex() == digits:
        return found
    raise InvalidRecord(f"{text[:100]!r} is not a lower-case UUID")


def uuid_text(found: bytes) -> str:
    """Write a UUID, given as sixteen bytes."""
    digits = found.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# A noncharacter: Unicode reserves it for internal use.
_ESCAPE = "\ufdd0"


def storable(text: str | None) -> str | None:
    """Encode a text so that every database can store it; `text_of` decodes it.

    Halves of surrogate pairs are lost: JSON may have them, UTF-8 cannot encode them, and each becomes a question mark.
    """
    if text is None:
        return None
    if "\0" in text or _ESCAPE in text:
        text = text.replace(_ESCAPE, f"{_ESCAPE}1").replace("\0", f"{_ESCAPE}0")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def text_of(found: Text) -> Text:
    """Decode a text that `storable` encoded."""
    if found is None or _ESCAPE not in found:
        return found
    return found.replace(f"{_ESCAPE}0", "\0").replace(f"{_ESCAPE}1", _ESCAPE)


def bytes_of(numbers: array[Any] | None) -> bytes | None:
    """Pack numbers, little-endian."""
    if numbers is None or sys.byteorder == "little":
        return None if numbers is None else numbers.tobytes()
    swapped = numbers[:]
    swapped.byteswap()
    return swapped.tobytes()


def array_of(kind: str, found: bytes | None) -> Any:
    """Unpack the numbers that `bytes_of` packed.

    Args:
        kind: type code of the array.

    Raises:
        ValueError: the length is not a multiple of a number's size.
    """
    if found is None:
        return None
    numbers = array(kind, found)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


_SHAPE = struct.Struct("<3I")


def experts_bytes(experts: RoutedExperts | None) -> bytes | None:
    """Pack routed experts: the shape, three uint32, and then the experts, int16."""
    return None if experts is None else _SHAPE.pack(*experts.shape) + (bytes_of(experts.ids) or b"")


def experts_of(found: bytes | None) -> RoutedExperts | None:
    """Unpack the routed experts that `experts_bytes` packed.

    Raises:
        ValueError: there are not as many as their shape says.
    """
    if found is None:
        return None
    if len(found) < _SHAPE.size:
        raise ValueError("routed experts without their shape")
    experts = RoutedExperts(_SHAPE.unpack_from(found), array_of("h", found[_SHAPE.size :]))
    if prod(experts.shape) != len(experts.ids):
        raise ValueError(f"{len(experts.ids)} routed experts, which is not what their shape says: {experts.shape}")
    return experts


def mask_bytes(mask: SamplingMask | None) -> bytes | None:
    """Pack a sampling mask: its number of positions, the number of ids at each, and then the ids."""
    return None if mask is None else _offset_bytes(mask.offsets) + (bytes_of(mask.ids) or b"")


def mask_of(found: bytes | None) -> SamplingMask | None:
    """Unpack the sampling mask that `mask_bytes` packed.

    Raises:
        ValueError: it is not as long as it says.
    """
    if found is None:
        return None
    offsets, (ids,) = _parts_of(found, 1)
    return SamplingMask(offsets, array_of("i", ids))


def top_bytes(top: TopLogprobs | None) -> bytes | None:
    """Pack logprobs of ids and alternatives, as `mask_bytes` does, and then the logprobs."""
    if top is None:
        return None
    return _offset_bytes(top.offsets) + (bytes_of(top.ids) or b"") + (bytes_of(top.logprobs) or b"")


def top_of(found: bytes | None) -> TopLogprobs | None:
    """Unpack the logprobs that `top_bytes` packed.

    Raises:
        ValueError: it is not as long as it says.
    """
    if found is None:
        return None
    offsets, (ids, logprobs) = _parts_of(found, 2)
    return TopLogprobs(offsets, array_of("i", ids), array_of("f", logprobs))


def _offset_bytes(offsets: array[int]) -> bytes:
    counts = array("I", (end - start for start, end in pairwise(offsets)))
    return struct.pack("<I", len(counts)) + (bytes_of(counts) or b"")


def _parts_of(found: bytes, how_many: int) -> tuple[array[int], list[bytes]]:
    """Split what is packed into the offsets at its beginning, and so many parts of 4 bytes for each id after them."""
    start = 4 + 4 * int.from_bytes(found[:4], "little")
    if len(found) < start:
        raise ValueError("numbers of ids are missing")
    counts = array_of("I", found[4:start])
    length = 4 * sum(counts)
    if how_many * length != len(found) - start:
        # Before they are added up: an offset has no room for more than 2^32.
        raise ValueError(f"{len(found) - start} bytes of ids, and not {how_many * length} as their numbers say")
    ends = range(start, len(found) + 1, length) if length else [start] * (how_many + 1)
    return array("I", accumulate(counts, initial=0)), [found[low:high] for low, high in pairwise(ends)]


class _Numbers(dict[str, int]):
    """The position of each value among all."""

    def __missing__(self, value: Any) -> int:
        raise InvalidRecord(f"{value!r:.100} is not one of {', '.join(self)}")


def _numbered(values: Sequence[str]) -> Packing:
    return _Numbers(zip(values, range(len(values)), strict=True)).__getitem__, values.__getitem__


ARRAYS: dict[Any, Packing] = {
    list[int]: (bytes_of, partial(array_of, "i")),
    list[float]: (bytes_of, partial(array_of, "f")),
    RoutedExperts: (experts_bytes, experts_of),
    SamplingMask: (mask_bytes, mask_of),
    TopLogprobs: (top_bytes, top_of),
}
"""Packings of arrays, by the type of a field: the same in columns and in messages."""
PACKINGS: dict[Any, Packing] = {
    **ARRAYS,
    Uuid: (uuid_bytes, uuid_text),
    str: (storable, text_of),
    Status: _numbered(STATUSES),
    Via: _numbered(VIAS),
    int | str: (json.dumps, json.loads),
    list[tuple[str, int, int]]: (versions_text, versions_of),
}
"""Packings of columns. Other types are kept as they are, and a `SharedText` by the key of its text."""

GENERATION = Layout(Generation, without=("id", "prompt_token_ids", "prompt_text", "choices"))
"""All but the id, and what `store.prompts` converts, and the choices, which have a table of their own."""
CHOICE = Layout(Choice)
LOSS = Layout(Loss)
