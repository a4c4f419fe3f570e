"""How much a body becomes, counted before anything is made of it: an empty value is two bytes, and becomes a hundred.

Counting stops at a limit, so that what is refused costs little, and is left out for bodies that cannot reach it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

__all__ = ["has_more_in_json", "has_more_in_protobuf"]

LEAST_BYTES = 2
"""The size of the smallest message in protobuf, with its header, and of a value in JSON, with its separator."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SEPARATORS = b",[{"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ELEMENT, _TEXT, _INTEGER, _DOUBLE = 0x0A, 0x0A, 0x18, 0x21
"""The tags of an element of an `ArrayValue`, and of what an `AnyValue` may be."""

Fields = Mapping[int, Any]
"""The fields of a message that are messages, by their numbers: each with its own fields."""


def has_more_in_json(body: bytes, limit: int) -> bool:
    """Whether a body in JSON has more values than the limit: what comes after a comma, or opens an array or object."""
    if len(body) <= LEAST_BYTES * limit or sum(body.count(each) for each in _SEPARATORS) <= limit:
        return False
    # A value has two texts at most, its name and itself, of two quotes each.
    if body.count(b'"') - body.count(b'\\"') > 4 * limit:
        return True
    # What is in a text is not a value.
    bare = _STRINGS.sub(b"", body)
    return sum(bare.count(each) for each in _SEPARATORS) > limit


def has_more_in_protobuf(body: bytes, kind: Any, messages: int, elements: int) -> bool:
    """Whether a body in protobuf has more than so many messages, at whatever depth, or elements of arrays.

    Args:
        kind: the descriptor of the body's message.
        elements: of arrays of numbers or texts, which are no other messages.
    """
    if len(body) <= LEAST_BYTES * min(messages, elements):
        return False
    # Flat: of half a million tuples the garbage collector would look at each, again and again.
    waiting: list[Any] = [kind, len(body), 0]
    try:
        while waiting:
            position, end, kind = waiting.pop(), waiting.pop(), waiting.pop()
            fields, is_array = _fields(kind)
            while position < end:
                # Token ids are long arrays, each of whose elements takes a few bytes: a number has no room for more.
                if is_array and body[position] == _ELEMENT:
                    size = body[position + 1]
                    if (
                        not size
                        or (
                            body[position + 2] == _INTEGER
                            and 2 <= size <= 5
                            and (size == 2 or body[position + 3] > 0x7F)
                        )
                        or (
                            size < 0x80
                            and body[position + 2] in (_TEXT, _DOUBLE)
                            and _is_plain(body, position + 2, size)
                        )
                    ):
                        position += 2 + size
                        elements -= 1
                        if elements < 0:
                            return True
                        continue
                # Nearly all tags and sizes are of one byte; a call for each would take most of the time.
                tag = body[position]
                position += 1
                if tag > 0x7F:
                    tag, position = _varint(body, position - 1)
                wire_type = tag & 7
                if wire_type == _BYTES:
                    size = body[position]
                    position += 1
                    if size > 0x7F:
                        size, position = _varint(body, position - 1)
                    inner = fields.get(tag >> 3)
                    if inner is not None:
                        messages -= 1
                        if messages < 0:
                            return True
                        if size:
                            waiting += (inner, position + size, position)
                    position += size
                elif wire_type == _VARINT:
                    _, position = _varint(body, position)
                elif wire_type == _FIXED64:
                    position += 8
                elif wire_type == _FIXED32:
                    position += 4
                # A group begins or ends: what is in it counts as if it were not.
    except IndexError:
        # Cut off: who reads it says so.
        return False
    return False


@lru_cache(256)
def _fields(kind: Any) -> tuple[Fields, bool]:
    """The fields of a message that are messages, and whether it is an array of values."""
    found = {field.number: field.message_type for field in kind.fields if field.type == FieldDescriptor.TYPE_MESSAGE}
    return found, kind.name == "ArrayValue"


def _is_plain(body: bytes, position: int, size: int) -> bool:
    """Whether an `AnyValue` is one short text or double, and has no room for anything else."""
    tag = body[position]
    return body[position + 1] == size - 2 if tag == _TEXT else tag == _DOUBLE and size == 9


def _varint(body: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = body[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise IndexError
