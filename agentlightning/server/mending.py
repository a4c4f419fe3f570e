"""Texts that are no UTF-8, in bodies: mended as those of generations are, so that nothing else is lost with them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

__all__ = ["mended_json", "mended_protobuf", "without_nan"]

# Each escape of JSON whole: a pair, half of one, or any other.
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


# Texts are passed over.
_NOT_FINITE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|(-?Infinity|NaN)', re.DOTALL)


def without_nan(body: bytes) -> bytes:
    """JSON as Python writes it, with null in the place of NaN and the infinities, which JSON has no number for."""
    return _NOT_FINITE.sub(lambda found: b"null" if found[1] else found[0], body)


def mended_json(body: bytes) -> bytes:
    """JSON with question marks in the place of halves of surrogate pairs, and of bytes that are no UTF-8."""
    return _ESCAPES.sub(lambda found: b"?" if found[1] else found[0], _mended(body).encode())


def mended_protobuf(body: bytes, message: Message) -> bytes:
    """A message in protobuf with question marks in the place of bytes that are no UTF-8, in each of its texts.

    Args:
        message: of its kind.

    Raises:
        DecodeError: it cannot be read otherwise either.
    """
    raw = _with_bytes(message.DESCRIPTOR)()
    raw.ParseFromString(body)
    _mend(raw, message.DESCRIPTOR)
    return raw.SerializeToString()


def _mended(text: bytes) -> str:
    try:
        found = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        found = text.decode("utf-8", "surrogateescape")
    return found.encode("utf-8", "replace").decode()


def _mend(raw: Any, kind: Any) -> None:
    for field, value in raw.ListFields():
        meant = kind.fields_by_number[field.number]
        if meant.message_type is not None:
            for each in (value,) if isinstance(value, Message) else value:
                _mend(each, meant.message_type)
        elif meant.type == FieldDescriptor.TYPE_STRING:
            if isinstance(value, bytes):
                setattr(raw, field.name, _mended(value).encode())
            else:
                value[:] = [_mended(each).encode() for each in value]


@lru_cache(8)
def _with_bytes(kind: Any) -> type[Message]:
    """The class of a message, in which all texts are bytes: those are taken as they come."""
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
            _take_bytes(each)
        pool.AddSerializedFile(copy.SerializeToString())

    add(kind.file)
    return GetMessageClass(pool.FindMessageTypeByName(kind.full_name))


def _take_bytes(kind: DescriptorProto) -> None:
    for field in kind.field:
        if field.type == FieldDescriptorProto.TYPE_STRING:
            field.type = FieldDescriptorProto.TYPE_BYTES
    for each in kind.nested_type:
        _take_bytes(each)
