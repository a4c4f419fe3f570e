"""Both sides of a break, beside each other, with the ids marked that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentlightning.drift._records import Token
from agentlightning.token_text import TokenTexts

__all__ = ["align", "differing"]

CONTEXT = 3
# Ids of both sides that are kept of a break.
SHOWN = 24
MOST_SKIPPED = 64


def align(
    before: Sequence[int],
    prompt: Sequence[int],
    position: int,
    texts: TokenTexts | None,
    texts_before: TokenTexts | None = None,
    shown: int = SHOWN,
) -> tuple[list[Token], list[Token]]:
    """Put both sides of a break beside each other, from shortly before the first difference on.

    Args:
        shown: number of ids behind it on either side.
    """
    start = max(position - CONTEXT, 0)
    one, other = before[start : position + shown], prompt[start : position + shown]
    differs = differing(one, other)
    known = texts if texts_before is None else texts_before
    return _tokens(one, differs[0], known), _tokens(other, differs[1], texts)


def _tokens(ids: Sequence[int], differs: Sequence[bool], texts: TokenTexts | None) -> list[Token]:
    return [
        Token(each, None if texts is None else texts.text(each), other)
        for each, other in zip(ids, differs, strict=True)
    ]


def differing(one: Sequence[Any], other: Sequence[Any]) -> tuple[list[bool], list[bool]]:
    """Mark the ids, or words, that differ, in linear time. What goes on behind the end of the first is not marked."""
    marks = [False] * len(one), [False] * len(other)
    at, beside = 0, 0
    while at < len(one) and beside < len(other):
        if one[at] == other[beside]:
            at, beside = at + 1, beside + 1
            continue
        left, right = _next_same(one[at : at + MOST_SKIPPED], other[beside : beside + MOST_SKIPPED])
        marks[0][at : at + left] = [True] * left
        marks[1][beside : beside + right] = [True] * right
        at, beside = at + left, beside + right
    marks[0][at:] = [True] * (len(one) - at)
    return marks


def _next_same(one: Sequence[Any], other: Sequence[Any]) -> tuple[int, int]:
    """Count the ids to skip on both sides, as few as possible, until two ids are the same."""
    for skipped in range(1, min(len(one) + len(other), MOST_SKIPPED)):
        for left in range(max(skipped - len(other) + 1, 0), min(skipped, len(one) - 1) + 1):
            right = skipped - left
            pair = one[left : left + 2], other[right : right + 2]
            if pair[0][0] == pair[1][0] and (min(map(len, pair)) == 1 or pair[0][1] == pair[1][1]):
                return left, right
    return len(one), len(other)
