"""Calls that may be continued: their ids, and a cache of them that is bounded in bytes."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentlightning.continuation._messages import Answer, Message, encoded

__all__ = [
    "MOST_CANDIDATES",
    "Call",
    "Histories",
    "Match",
    "Rendered",
]

# A Python object and its places in a dictionary and a list; ids are counted with four bytes each.
BYTES_PER_CALL = 1000
MOST_CANDIDATES = 16
"""The most calls with equal messages that are tried, the latest first: each answer is parsed while a request waits."""
# Reasoning as templates write it, with the white space behind; or its beginning, which the model goes on from.
_THOUGHT = re.compile(r"<((?:\w+:)?think)>.*?(?:</\1>\s*|\Z)", re.DOTALL)


class Rendered(NamedTuple):
    """A text that a template has made, which may be long.

    Attributes:
        bare_length, bare_digest: those of the text without what was thought in it.
    """

    length: int
    digest: bytes
    bare_length: int
    bare_digest: bytes

    @classmethod
    def of(cls, text: str) -> Rendered:
        """Describe a text."""
        bare = _bare(text)
        digest = _digest(text)
        return cls(len(text), digest, len(bare), digest if bare == text else _digest(bare))

    def begins(self, text: str) -> bool:
        """Tell whether a text begins with this one."""
        return len(text) >= self.length and _digest(text[: self.length]) == self.digest

    def bare_end(self, text: str) -> int | None:
        """Return the place up to which a text is this one but for what was thought in them; None if it is another."""
        end = self.bare_length
        for thought in _THOUGHT.finditer(text):
            if thought.start() >= end:
                break
            end += len(thought[0])
        bare = _bare(text[:end])
        return end if len(bare) == self.bare_length and _digest(bare) == self.bare_digest else None


def _bare(text: str) -> str:
    return _THOUGHT.sub("", text) if "think>" in text else text


def _digest(text: str) -> bytes:
    return hashlib.sha256(encoded(text)).digest()


@dataclass(eq=False, slots=True)
class Call:
    """An answered call: the ids that its model read and sampled.

    Attributes:
        position: the number of its messages: its answer has this place in the next request.
        rendered: the text that the template made of these messages.
        prompt_token_ids: the ids of its prompt, but for those of `continued`.
        response_token_ids: the ids of its answer.
        ends: the ids that end its answer: those of the model, and those that its client has asked for.
        ended: whether the last id of the answer is one of these.
        is_open: whether a stop string of its client has ended the answer instead: some clients go on from there.
        kind: a digest of what else has to be equal for a request to continue it.
        said: the text of its answer before it is parsed, and what parsing needs to know.
        continued: the call whose prompt and answer its own prompt begins with.
        answers: what its client may have been told, once that was asked for: a stream may differ from a plain answer.
    """

    position: int
    rendered: Rendered
    prompt_token_ids: array[int]
    response_token_ids: array[int]
    ends: Collection[int]
    ended: bool
    said: Any
    continued: Call | None = None
    answers: Sequence[Answer] | None = None
    is_open: bool = False
    kind: bytes = b""

    @property
    def nbytes(self) -> int:
        """The memory that it keeps, roughly."""
        text = getattr(self.said, "nbytes", 0)
        return BYTES_PER_CALL + text + 4 * (len(self.prompt_token_ids) + len(self.response_token_ids))

    @property
    def length(self) -> int:
        """The number of ids that prompt and answer have."""
        return sum(map(len, self._parts()))

    def token_ids(self) -> list[int]:
        """Return the ids of prompt and answer."""
        return _joined(self._parts())

    def prompt(self) -> list[int]:
        """Return the ids of its prompt, from the first."""
        return _joined(self._parts()[:-1])

    def _parts(self) -> list[array[int]]:
        parts: list[array[int]] = []
        call: Call | None = self
        while call is not None:
            parts += (call.response_token_ids, call.prompt_token_ids)
            call = call.continued
        return parts[::-1]

    def detach(self) -> None:
        """Keep all ids itself, since the call that it continued is no longer kept."""
        if self.continued is not None:
            self.prompt_token_ids, self.continued = array("i", self.prompt()), None

    def reasoning(self, own: Answer) -> dict[int, str]:
        """Return the reasoning in its context, by the place of the message; `own` is its own answer."""
        found = {self.position: own.reasoning}
        call = self.continued
        while call is not None:
            if call.answers:
                found[call.position] = call.answers[0].reasoning
            call = call.continued
        return {position: reasoning for position, reasoning in found.items() if reasoning.strip()}


def _joined(parts: Sequence[array[int]]) -> list[int]:
    ids = array("i")
    for part in parts:
        ids += part
    return ids.tolist()


class Match(NamedTuple):
    """The call that a request continues, and the answer that the request repeats.

    Attributes:
        added: what the client has added to the answer.
    """

    call: Call
    answer: Answer
    added: str = ""


@dataclass(slots=True)
class _Conversation:
    """The calls of one rollout, by the fingerprint of their messages, and by their kind."""

    calls: dict[bytes, dict[bytes, list[Call]]] = field(default_factory=dict[bytes, dict[bytes, list[Call]]])
    members: set[Call] = field(default_factory=set[Call])
    nbytes: int = 0


class Histories:
    """The calls that may be continued, bounded in bytes; the rollout that was not used for longest goes first, whole.

    Args:
        limit: how many bytes they may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._conversations: OrderedDict[Hashable, _Conversation] = OrderedDict()
        self.nbytes = 0
        self.dropped = 0

    def __len__(self) -> int:
        return sum(len(conversation.members) for conversation in self._conversations.values())

    def knows(self, key: Hashable) -> bool:
        """Tell whether any call is kept under this key."""
        return key in self._conversations

    def has(self, key: Hashable, prompt: array[int], response: array[int]) -> bool:
        """Tell whether a call with these ids is kept under this key, whatever its messages are."""
        conversation = self._conversations.get(key)
        return conversation is not None and any(
            # In this order: most calls have another answer, and of the others few are as long.
            call.response_token_ids == response
            and call.length == len(prompt) + len(response)
            and array("i", call.prompt()) == prompt
            for call in conversation.members
        )

    def find(
        self,
        key: Hashable,
        messages: Sequence[Message],
        fingerprints: Sequence[bytes],
        answers_of: Callable[[Call], Sequence[Answer]],
        kind: bytes = b"",
    ) -> Match | None:
        """Return the longest call whose messages and answer the messages begin with; of equal ones the latest.

        Args:
            key, kind: whose call it has to be, and of which kind.
            fingerprints: those of the messages.
            answers_of: parses a call's answer, when it is first needed.
        """
        conversation = self._conversations.get(key)
        if conversation is None:
            return None
        self._conversations.move_to_end(key)
        # Something new has to follow the answer.
        for position in range(len(messages) - 2, -1, -1):
            if messages[position]["role"] == "assistant":
                candidates = conversation.calls.get(fingerprints[position], {}).get(kind, ())
                match = _answered(candidates[-MOST_CANDIDATES:], messages[position], answers_of)
                if match is not None:
                    # This is what it said, from here on.
                    match.call.answers = [match.answer]
                    return match
        return None

    def has_of_other_kind(self, key: Hashable, fingerprint: bytes, kind: bytes) -> bool:
        """Tell whether all calls with these messages that are kept under this key are of other kinds; and any is."""
        conversation = self._conversations.get(key)
        kinds = {} if conversation is None else conversation.calls.get(fingerprint, {})
        return bool(kinds) and kind not in kinds

    def add(self, key: Hashable, fingerprint: bytes, call: Call) -> None:
        """Keep a call, under the fingerprint of its messages."""
        conversation = self._conversations.setdefault(key, _Conversation())
        self._conversations.move_to_end(key)
        if call.continued not in conversation.members:
            call.detach()
        conversation.calls.setdefault(fingerprint, {}).setdefault(call.kind, []).append(call)
        conversation.members.add(call)
        conversation.nbytes += call.nbytes
        self.nbytes += call.nbytes
        while self.nbytes > self._limit:
            _, oldest = self._conversations.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self.dropped += len(oldest.members)


def _answered(calls: Sequence[Call], message: Message, answers_of: Callable[[Call], Sequence[Answer]]) -> Match | None:
    """Return the latest of these calls whose answer a message is, or else the one to which it adds the least."""
    begun: Match | None = None
    for call in reversed(calls):
        if call.answers is None:
            call.answers = answers_of(call)
        for answer in call.answers:
            if answer.is_said_by(message):
                return Match(call, answer)
            added = answer.added_by(message) if call.is_open else ""
            if added and (begun is None or len(added) < len(begun.added)):
                begun = Match(call, answer, added)
    return begun
