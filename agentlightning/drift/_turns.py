"""Turns of a sequence of ids: what stands between special tokens of a chat template."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from agentlightning.common_prefix import ID_BYTES
from agentlightning.token_text import TokenTexts

__all__ = ["boundaries_in", "bounds", "find_ids", "ids_array", "next_of", "turn_names", "turn_start"]

# Tokens that stand inside a turn.
_MARKUP = re.compile(
    r"think|tool_?calls?\b|TOOL_CALLS|\[ARGS\]|\[CALL_ID\]|python_tag|tool▁(?:call|sep)|end_header_id|header_end"
    r"|<\|(?:message|channel|constrain|call)\|>",
    re.IGNORECASE,
)
# Special tokens that are sought one by one: more than this take longer.
MOST_SOUGHT = 16


def turn_names(token_ids: Sequence[int], texts: TokenTexts) -> list[bytes]:
    """Return the turns of a sequence, each as the bytes of its ids; those without any id between are left out."""
    whole, found, start = ids_array(token_ids), list[bytes](), 0
    for end in [*bounds(whole, texts), len(whole)]:
        if end > start:
            found.append(whole[start:end].tobytes())
        start = end + 1
    return found


def turn_start(token_ids: Sequence[int], position: int, texts: TokenTexts) -> int:
    """Return where the turn begins that a position is in."""
    boundaries = boundaries_in(texts)
    while position and token_ids[position - 1] not in boundaries:
        position -= 1
    return position


def ids_array(token_ids: Sequence[int]) -> array[int]:
    """Return ids as an array, copied only where they are not one yet."""
    if isinstance(token_ids, array):
        return token_ids
    # A view is copied as bytes, not id by id.
    return array("i", token_ids.tobytes() if isinstance(token_ids, memoryview) else token_ids)


_known: WeakKeyDictionary[TokenTexts, frozenset[int]] = WeakKeyDictionary()


def boundaries_in(texts: TokenTexts) -> frozenset[int]:
    """Return the special tokens that stand between turns."""
    if (found := _known.get(texts)) is None:
        found = frozenset(each for each in texts.special if not _MARKUP.search(texts.text(each)))
        _known[texts] = found
    return found


def bounds(token_ids: array[int], texts: TokenTexts) -> list[int]:
    """Return where the special tokens are that stand between turns."""
    boundaries = boundaries_in(texts)
    if len(boundaries) > MOST_SOUGHT:
        return [place for place, each in enumerate(token_ids) if each in boundaries]
    # Searching bytes for a few of them is quicker than looking at each id.
    whole = token_ids.tobytes()
    return sorted(place for each in boundaries for place in _places(whole, array("i", [each]).tobytes()))


def next_of(token_ids: array[int], start: int, wanted: frozenset[int]) -> int:
    """Return the position of the first of these ids from a position on; the length where there is none."""
    for place in range(start, len(token_ids)):
        if token_ids[place] in wanted:
            return place
    return len(token_ids)


def _places(whole: bytes, one: bytes) -> Iterator[int]:
    """Yield the positions of an id among others."""
    at = find_ids(whole, one, 0)
    while at >= 0:
        yield at // ID_BYTES
        at = find_ids(whole, one, at // ID_BYTES + 1)


def find_ids(whole: bytes, part: bytes, start: int) -> int:
    """Find ids among others, behind a position."""
    at = whole.find(part, start * ID_BYTES)
    while at >= 0 and at % ID_BYTES:
        at = whole.find(part, at + 1)
    return at
