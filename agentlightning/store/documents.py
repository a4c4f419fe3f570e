"""JSON documents as text columns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from agentlightning.errors import InvalidRecord

__all__ = ["RawJson", "to_json"]


class RawJson(str):
    """JSON text that is stored as it is: it was parsed and checked before."""

    __slots__ = ()


def to_json(value: Any) -> str:
    """Serialize a value as JSON text that every database can hold.

    Numbers that JSON does not have (NaN, infinities) become null, as the HTTP interface does it; halves of surrogate
    pairs, which UTF-8 does not have, become question marks.

    Raises:
        InvalidRecord: the value is not JSON.
    """
    if isinstance(value, RawJson):
        return value
    try:
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        except ValueError:
            text = json.dumps(_without_nan(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return value
