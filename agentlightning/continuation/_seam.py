"""The seam of a prompt: where it goes on from a call, proved from what the chat template makes of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from agentlightning.common_prefix import common_length
from agentlightning.continuation._calls import Match
from agentlightning.continuation._messages import Message, texts_of
from agentlightning.continuation._results import NOT_APPEND_ONLY, REASONING_DROPPED, SEAM

__all__ = [
    "Seam",
    "find_seam",
]


class Seam(NamedTuple):
    """The place where a prompt goes on from a call.

    Attributes:
        start: the place in the template's text of what follows the answer.
        end: that of the token that ends the turn: the same, unless its client has added to the answer.
        end_id: that token.
    """

    start: int
    end: int
    end_id: int


def find_seam(
    whole: str,
    stand_in: str | None,
    match: Match,
    message: Message,
    ends: Mapping[int, str],
    keep: bool,
    read: Callable[[str], str] = str,
) -> Seam | str:
    """Prove that a template only appends behind a call's answer, and find the place; or return the reason why not.

    Args:
        whole: what the template makes of the request, each answer with its reasoning.
        stand_in: the same up to the answer, and a stand-in for the message that follows it; None where that is not to
            be rendered: then nothing proves that what the template makes of the answer does not depend on what follows.
        match: the call, and its answer.
        message: the message that repeats the answer.
        ends: the tokens that end a turn, as text by id; no text that a user may write is one of them.
        keep: go on from reasoning that the template leaves out.
        read: returns the text of a part of `whole`, if the template makes no text.
    """
    call, answer, added = match
    start = call.rendered.length if call.rendered.begins(whole) else None
    dropped = start is None or bool(answer.reasoning.strip()) or "</think>" in answer.text
    if start is None:
        start = call.rendered.bare_end(whole)
        reasoning = call.reasoning(answer).values()
        if start is None:
            # Where reasoning is written in a way that is not known here, nothing proves that the rest is unchanged.
            missing = reasoning and not all(map(read(whole).__contains__, reasoning))
            return REASONING_DROPPED if missing and not keep else NOT_APPEND_ONLY
        if not keep:
            return REASONING_DROPPED
    if stand_in is not None:
        shared = common_length(whole, stand_in)
    else:
        said = [answer.text, answer.reasoning, *chain.from_iterable(answer.tool_calls)]
        if any(end in text for end in ends.values() for text in said):
            return SEAM
        places = ((whole.find(end, start), end) for end in ends.values())
        shared = min((place + len(end) for place, end in places if place >= 0), default=0)
    found = [(place, end_id) for end_id, text in ends.items() for place in _places(whole, text, start, shared)]
    if not found and any(text in whole[start:] for text in ends.values()):
        # What it makes of the answer depends on what follows.
        return REASONING_DROPPED if dropped else NOT_APPEND_ONLY
    end, end_id = min(found, default=(0, None))
    # The answer's own, once: what stands between it and another one would be left out.
    if (
        end_id is None
        or sum(each == end_id for _, each in found) != 1
        or (call.ended and call.response_token_ids[-1] != end_id)
    ):
        return SEAM
    turn = read(whole[start:end])
    texts = texts_of(message.get("content"))
    is_whole = _has_apart(turn, answer.reasoning.strip()) and all(text.strip() in turn for text in texts)
    if not is_whole and not (dropped and keep and all(_unthought(text) in turn for text in texts)):
        return REASONING_DROPPED if dropped else NOT_APPEND_ONLY
    if not added:
        return Seam(end, end, end_id)
    # Where the template makes no text, nothing tells where in `whole` a part of a turn begins.
    if turn != whole[start:end] or not turn.rstrip().endswith(answer.text.lstrip() + added):
        return SEAM
    return Seam(start + len(turn.rstrip()) - len(added), end, end_id)


def _has_apart(turn: str, thought: str) -> bool:
    """Tell whether a thought is in a turn, and not only within its words: a short one may be."""
    return not thought or re.search(rf"(?<!\w){re.escape(thought)}(?!\w)", turn) is not None


def _unthought(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def _places(text: str, part: str, start: int, end: int) -> list[int]:
    places: list[int] = []
    place = text.find(part, start, end)
    while place >= 0:
        places.append(place)
        place = text.find(part, place + len(part), end)
    return places
