"""Decoding of request bodies: limits on how much a body becomes, and repair of text that is not UTF-8.

Values are counted before a body is decoded: an empty one takes two bytes on the wire, and a hundred in memory. Counting
is skipped for bodies too small to reach the limit, and stops there, so that refusing costs little. Text is repaired as
the text of generations is, so that one broken string does not lose everything else in its body.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.types import Scope

__all__ = [
    "has_more_containers",
    "has_more_in_json",
    "has_more_in_protobuf",
    "header",
    "repair_json",
    "repair_protobuf",
    "without_nan",
]

LEAST_BYTES = 2
"""The size of the smallest protobuf message, with its header, and of the smallest JSON value, with its separator."""

BYTES_AT_ONCE = 1 << 20

# A quote after a backslash begins no string: else one that is cut off would be searched again from each of them.
_STRINGS = re.compile(rb'(?<!\\)"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OPENING = b"[{"
_SEPARATORS = b"," + _OPENING

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ELEMENT, _TEXT, _INTEGER, _DOUBLE = 0x0A, 0x0A, 0x18, 0x21
"""Tags of an element of an `ArrayValue`, and of the kinds of `AnyValue`."""

Fields = Mapping[int, Any]
"""The fields of a message that are messages themselves: by field number, the descriptor of each."""

# One JSON escape: a surrogate pair, half of one, or any other.
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
# A whole string, so that its contents are skipped, or a number that JSON does not have.
_NOT_FINITE = re.compile(rb'(?<!\\)"[^"\\]*(?:\\.[^"\\]*)*"|(-?Infinity|NaN)', re.DOTALL)


def header(scope: Scope, name: str) -> str | None:
    """Return the first header of this lower-case name; None if there is none.

    Agents send UTF-8; ASGI reads headers as Latin-1, which remains the fallback.
    """
    encoded = name.encode()
    for each, value in scope["headers"]:
        if each == encoded:
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.decode("latin-1")
    return None


def has_more_in_json(body: bytes, limit: int) -> bool:
    """Tell whether a JSON body has more values than the limit, counting commas and opening brackets."""
    return len(body) > LEAST_BYTES * limit and _has_more(body, _SEPARATORS, limit)


def has_more_containers(body: bytes, limit: int) -> bool:
    """Tell whether a JSON body has more objects and arrays than the limit: each takes far more memory than a number."""
    return len(body) > LEAST_BYTES * limit and _has_more(body, _OPENING, limit)


def _has_more(body: bytes, signs: bytes, limit: int) -> bool:
    """Tell whether a JSON body has more of these characters than the limit, outside of its strings."""
    if sum(body.count(each) for each in signs) <= limit:
        return False
    # A value has at most two strings, its name and itself, of two quotes each.
    if signs == _SEPARATORS and body.count(b'"') - body.count(b'\\"') > 4 * limit:
        return True
    # Those within strings do not count. In parts: each string that is left out takes memory meanwhile.
    found, position, rest = 0, 0, b""
    while position < len(body) and found <= limit:
        # Up to the end of a string that the last part has cut off: a long one is not to be read again and again.
        closing = body.find(b'"', position) + 1 if rest else 0
        end = max(position + max(BYTES_AT_ONCE, len(rest)), closing)
        bare, quote, cut_off = _STRINGS.sub(b"", rest + body[position:end]).partition(b'"')
        found += sum(bare.count(each) for each in signs)
        position, rest = end, quote + cut_off
    return found > limit


def without_nan(body: bytes) -> bytes:
    """Replace NaN and infinities, which Python writes but JSON does not have, with null."""
    return _NOT_FINITE.sub(lambda found: b"null" if found[1] else found[0], body)


def repair_json(body: bytes) -> bytes:
    """Replace unpaired surrogates, and bytes that are not UTF-8, with question marks."""
    return _ESCAPES.sub(lambda found: b"?" if found[1] else found[0], _repaired(body).encode())


def has_more_in_protobuf(body: bytes, kind: Any, messages: int, elements: int) -> bool:
    """Tell whether a protobuf body has more messages, at any depth, or more elements of arrays than the limits.

    Args:
        kind: the descriptor of the body's message.
        messages: limit on messages that are not elements of arrays.
        elements: limit on elements of arrays of numbers or strings.
    """
    if len(body) <= LEAST_BYTES * min(messages, elements):
        return False
    # Flat: the garbage collector would visit half a million tuples again and again.
    waiting: list[Any] = [kind, len(body), 0]
    try:
        while waiting:
            position, end, kind = waiting.pop(), waiting.pop(), waiting.pop()
            fields, is_array = _fields(kind)
            while position < end:
                # Token ids are long arrays whose elements take a few bytes each: no room for nested messages.
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
                # Nearly all tags and sizes are one byte long; a call for each would take most of the time.
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
                # A group begins or ends: its contents count as if there were no group.
    except IndexError:
        # Truncated: parsing it reports that.
        return False
    return False


@lru_cache(256)
def _fields(kind: Any) -> tuple[Fields, bool]:
    """Return the fields of a message that are messages, and whether it is an array of values."""
    found = {field.number: field.message_type for field in kind.fields if field.type == FieldDescriptor.TYPE_MESSAGE}
    return found, kind.name == "ArrayValue"


def _is_plain(body: bytes, position: int, size: int) -> bool:
    """Tell whether an `AnyValue` is one short string or double, with no room for anything else."""
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


def repair_protobuf(body: bytes, message: Message) -> bytes:
    """Replace bytes that are not UTF-8 with question marks, in every string of a protobuf message.

    Args:
        message: any message of the same type.

    Raises:
        DecodeError: the body is malformed in other ways as well.
    """
    raw = _class_with_bytes(message.DESCRIPTOR)()
    raw.ParseFromString(body)
    _repair(raw, message.DESCRIPTOR)
    return raw.SerializeToString()


def _repaired(text: bytes) -> str:
    try:
        found = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        found = text.decode("utf-8", "surrogateescape")
    return found.encode("utf-8", "replace").decode()


def _repair(raw: Any, kind: Any) -> None:
    for field, value in raw.ListFields():
        declared = kind.fields_by_number[field.number]
        if declared.message_type is not None:
            for each in (value,) if isinstance(value, Message) else value:
                _repair(each, declared.message_type)
        elif declared.type == FieldDescriptor.TYPE_STRING:
            if isinstance(value, bytes):
                setattr(raw, field.name, _repaired(value).encode())
            else:
                value[:] = [_repaired(each).encode() for each in value]


@lru_cache(8)
def _class_with_bytes(kind: Any) -> type[Message]:
    """Return a message's class with bytes in place of strings, which accepts anything."""
    pool, added = DescriptorPool(), set[str]()

    def add(file: Any) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for each in file.dependencies:
            add(each)
        copy = FileDescriptorProto()
        file.CopyToProto(copy)
        for each in copy.message_type:
            _strings_to_bytes(each)
        pool.AddSerializedFile(copy.SerializeToString())

    add(kind.file)
    return GetMessageClass(pool.FindMessageTypeByName(kind.full_name))


def _strings_to_bytes(kind: DescriptorProto) -> None:
    for field in kind.field:
        if field.type == FieldDescriptorProto.TYPE_STRING:
            field.type = FieldDescriptorProto.TYPE_BYTES
    for each in kind.nested_type:
        _strings_to_bytes(each)
