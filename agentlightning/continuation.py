"""Continuation: which earlier call a chat request continues, and where its prompt goes on.

Decisions about messages, rendered text and ids, and a bounded cache of the calls that may be continued. A request
continues a call if its messages are those of that call, then the call's answer, then something new. Its prompt then is
the call's exact ids, and after them what the chat template adds behind the end of the answer, provided that the
template only appends there.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from agentlightning.common_prefix import common_length

__all__ = [
    "CONTINUED",
    "CONTINUED_EARLIER",
    "ELSEWHERE",
    "FIRST_CALL",
    "MOST_CANDIDATES",
    "NOT_APPEND_ONLY",
    "NOT_TEXT",
    "NO_MATCH",
    "OTHER_OPTIONS",
    "OTHER_REQUEST",
    "PARSER",
    "REASONING_DROPPED",
    "RESULTS",
    "SEAM",
    "STORE_NOT_AVAILABLE",
    "TOO_LONG",
    "Answer",
    "Call",
    "Histories",
    "Match",
    "NotText",
    "Rendered",
    "Seam",
    "canonical_calls",
    "find_seam",
    "fingerprints",
    "is_marked",
    "last_answer",
    "stand_in_for",
    "with_reasoning",
]

CONTINUED = "continued"
CONTINUED_EARLIER = "continued from an earlier call"
FIRST_CALL = "first call"
NO_MATCH = "no match"
OTHER_OPTIONS = "other tools or options"
ELSEWHERE = "elsewhere"
STORE_NOT_AVAILABLE = "store not available"
NOT_APPEND_ONLY = "template not append-only"
REASONING_DROPPED = "reasoning dropped"
SEAM = "seam"
TOO_LONG = "too long"
NOT_TEXT = "not text"
PARSER = "reasoning parser"
OTHER_REQUEST = "other request"

RESULTS = {
    CONTINUED: "the prompt goes on from the exact ids of an earlier call",
    CONTINUED_EARLIER: "the prompt goes on from a call whose answer is not the last in the request: that is not known",
    FIRST_CALL: "the request has no answer in it",
    NO_MATCH: "no call of this rollout had these messages and this answer",
    OTHER_OPTIONS: "the call with these messages had other tools, another model or other template options",
    ELSEWHERE: "this server knows no call of this rollout, or no longer, and found none in the store in time",
    STORE_NOT_AVAILABLE: "this server knows no call of this rollout, and the store did not answer in time, or failed",
    NOT_APPEND_ONLY: "the chat template writes what came before in another way once something follows",
    REASONING_DROPPED: "the chat template leaves out the reasoning that the model wrote",
    SEAM: "the answer does not end with the token that ends a turn in the template",
    TOO_LONG: "the exact ids leave no place for an answer in what the model takes",
    NOT_TEXT: "the messages are not only text",
    PARSER: "the reasoning parser would take earlier reasoning in the exact ids for that of this answer",
    OTHER_REQUEST: "an option of the request needs vLLM's own prompt",
}
"""Results of a request, each with its reason."""

Message = Mapping[str, Any]
ToolCall = tuple[str, str]

# A Python object and its places in a dictionary and a list; ids are counted with four bytes each.
BYTES_PER_CALL = 1000
MOST_CANDIDATES = 16
"""The most calls with equal messages that are tried, the latest first: each answer is parsed while a request waits."""
_BILLING_HEADER = "x-anthropic-billing-header"
_STAND_INS = ("?", "!")
# Reasoning as templates write it, with the white space behind; or its beginning, which the model goes on from.
_THOUGHT = re.compile(r"<((?:\w+:)?think)>.*?(?:</\1>\s*|\Z)", re.DOTALL)
_MARKED = re.compile(r"(?P<before>\s*<(?P<name>\w+)>)(?P<text>.*)(?P<after></(?P=name)>\s*)", re.DOTALL)
_TEXT_TYPES = ("text", "input_text", "output_text")


class NotText(Exception):
    """A message has a part that is not text."""


def _texts(content: Any) -> list[str]:
    """Return the texts of a message's content.

    Raises:
        NotText: a part is an image, or anything else.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    return [_text(part) for part in content]


def _text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_TYPES else part
    if not isinstance(text, str):
        raise NotText(type(part).__name__)
    return text


def _without_header(text: str) -> str:
    # Claude Code's system prompt has one that differs from call to call; vLLM leaves it out of its prompts.
    return text.partition("\n")[2] if text.startswith(_BILLING_HEADER) else text


def _reasoning(message: Message) -> str:
    return message.get("reasoning") or message.get("reasoning_content") or ""


def canonical_calls(tool_calls: Any) -> tuple[ToolCall, ...]:
    """Return the name and the arguments of each tool call, equal for arguments that are equal as JSON."""
    functions = [call["function"] for call in tool_calls or ()]
    return tuple((function["name"], _canonical_json(function.get("arguments"))) for function in functions)


def _canonical_json(arguments: Any) -> str:
    if not arguments:
        return "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments.strip()
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def fingerprints(messages: Sequence[Message]) -> list[bytes]:
    """Return a digest of each beginning of a conversation: the nth stands for the first n messages.

    It is of what they mean: not of the ids of messages and tool calls, cache marks or reasoning, nor of how texts are
    split and JSON is written.

    Raises:
        NotText: a message has a part that is not text.
    """
    running = hashlib.sha256()
    digests = [running.digest()]
    for message in messages:
        texts = _texts(message.get("content"))
        match message["role"]:
            case "assistant":
                text = "".join(texts).strip()
            case "system":
                text = "\n".join(map(_without_header, texts))
            case _:
                text = "\n".join(texts)
        # Templates may write them: the tools of a message, what it is for, and the call that it is the result of.
        options = [message.get(name) for name in ("name", "tools", "task", "tool_call_id")]
        written = json.dumps(options, sort_keys=True, default=repr) if any(options) else ""
        calls = (part for call in canonical_calls(message.get("tool_calls")) for part in call)
        for each in (message["role"], written, text, *calls):
            data = _bytes(each)
            running.update(b"%d:" % len(data))
            running.update(data)
        running.update(b";")
        digests.append(running.digest())
    return digests


def last_answer(messages: Sequence[Message]) -> int | None:
    """Return the place of the last answer of a model that has something behind it; None if there is none."""
    places = range(len(messages) - 2, -1, -1)
    return next((place for place in places if messages[place]["role"] == "assistant"), None)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a model, as its client was told.

    Attributes:
        text: without reasoning and tool calls.
        tool_calls: as `canonical_calls` returns them.
        reasoning: empty if there is none.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""

    def is_said_by(self, message: Message) -> bool:
        """Tell whether a message means this answer; clients may leave out reasoning, and white space at the ends."""
        texts = _texts(message.get("content"))
        return self._is_reasoned_by(message) and self.text.strip() in ("".join(texts).strip(), "\n".join(texts).strip())

    def added_by(self, message: Message) -> str:
        """Return what a message has behind this answer, which it means; empty if it means another, or has nothing."""
        text, said = "".join(_texts(message.get("content"))).strip(), self.text.lstrip()
        # Templates write tool calls behind the text, where nothing can be added to it.
        if not said or self.tool_calls or not text.startswith(said) or not self._is_reasoned_by(message):
            return ""
        return text.removeprefix(said)

    def _is_reasoned_by(self, message: Message) -> bool:
        return canonical_calls(message.get("tool_calls")) == self.tool_calls and _reasoning(message).strip() in (
            "",
            self.reasoning.strip(),
        )


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
    return hashlib.sha256(_bytes(text)).digest()


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


def with_reasoning(messages: Sequence[Message], reasoning: Mapping[int, str]) -> Sequence[Message]:
    """Return the messages, with the reasoning that the model gave in those whose client has left it out."""
    missing = {position: text for position, text in reasoning.items() if not _reasoning(messages[position])}
    if not missing:
        return messages
    return [
        {**message, "reasoning": missing[position], "reasoning_content": missing[position]}
        if position in missing
        else message
        for position, message in enumerate(messages)
    ]


def _marked(message: Message) -> re.Match[str] | None:
    return _MARKED.fullmatch("".join(_texts(message.get("content"))))


def is_marked(message: Message) -> bool:
    """Tell whether a text has marks around it, such as those of a tool's result, which templates look for."""
    return _marked(message) is not None


def stand_in_for(message: Message) -> dict[str, Any]:
    """Return a message like this one, with another text: what a template makes of both alike does not depend on it."""
    text, marked = "".join(_texts(message.get("content"))), _marked(message)
    before, text, after = marked.group("before", "text", "after") if marked else ("", text, "")
    other = before + next(each for each in _STAND_INS if not text.lstrip().startswith(each)) + after
    content = other if not isinstance(message.get("content"), list) else [{"type": "text", "text": other}]
    return {**message, "content": content}


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
    texts = _texts(message.get("content"))
    is_whole = all(text.strip() in turn for text in (answer.reasoning, *texts))
    if not is_whole and not (dropped and keep and all(_unthought(text) in turn for text in texts)):
        return REASONING_DROPPED if dropped else NOT_APPEND_ONLY
    if not added:
        return Seam(end, end, end_id)
    # Where the template makes no text, nothing tells where in `whole` a part of a turn begins.
    if turn != whole[start:end] or not turn.rstrip().endswith(answer.text.lstrip() + added):
        return SEAM
    return Seam(start + len(turn.rstrip()) - len(added), end, end_id)


def _unthought(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def _places(text: str, part: str, start: int, end: int) -> list[int]:
    places: list[int] = []
    place = text.find(part, start, end)
    while place >= 0:
        places.append(place)
        place = text.find(part, place + len(part), end)
    return places
