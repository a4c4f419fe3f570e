"""Descriptions of vLLM's objects: all their readable attributes, as JSON."""

from __future__ import annotations

import functools
import json
import os
import re
import types
from collections import deque
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any

__all__ = ["write"]

# UUIDs, and the random digits that vLLM and its frontends make ids of.
_RANDOM = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}|[0-9a-f]{8,}")
_TIME = re.compile(r"time|latency|_ts$|interval")
# Where there was room in the cache, and whether a grammar is compiled yet, which another thread does.
_VARIES = re.compile(r"block_ids$|^_?grammar$")
_DEEPEST = 7


def write(who: str, *values: Any) -> None:
    """Write down one call: which plugin was called, and what it was shown."""
    line = json.dumps([who, *(_described(value, "", 0) for value in values)])
    # At once, so that the lines of several processes and threads stay apart.
    file = os.open(os.environ["PLUGINS_WRITE_TO"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def _described(value: Any, name: str, depth: int) -> Any:
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return "a time" if _TIME.search(name) or value > 1e6 else value
    if isinstance(value, str):
        return _RANDOM.sub("*", value)
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    if isinstance(value, type | types.FunctionType | types.MethodType | types.ModuleType | functools.partial):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return [type(value).__qualname__, list(value.shape), str(value.dtype)]
    if depth == _DEEPEST:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        # A random id is no key to compare by.
        return sorted(
            ([_described(key, "", depth + 1), _described(item, str(key), depth + 1)] for key, item in value.items()),
            key=json.dumps,
        )
    if isinstance(value, Set):
        return sorted((_described(item, name, depth + 1) for item in value), key=json.dumps)
    if isinstance(value, Sequence | deque):
        return [_described(item, name, depth + 1) for item in value]
    attributes = {
        each: "varies" if _VARIES.search(each) else _described(item, each, depth + 1)
        for each, item in _attributes(value).items()
    }
    return {"class": type(value).__qualname__, **attributes}


def _attributes(value: Any) -> dict[str, Any]:
    """Return all attributes of an object, or of a `msgspec.Struct`, which has no dictionary."""
    names = [
        *getattr(value, "__struct_fields__", ()),
        *(name for cls in type(value).__mro__ for name in _slots(cls)),
        *getattr(value, "__dict__", ()),
    ]
    return {name: getattr(value, name) for name in dict.fromkeys(names) if hasattr(value, name)}


def _slots(cls: type) -> Sequence[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [slot for slot in slots if not slot.startswith("__")]
