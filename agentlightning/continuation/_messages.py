"""Messages of a chat request: what they mean, and whether one repeats an answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Answer",
    "Message",
    "NotText",
    "ToolCall",
    "canonical_calls",
    "encoded",
    "fingerprints",
    "is_marked",
    "last_answer",
    "reasoning_of",
    "stand_in_for",
    "texts_of",
    "with_reasoning",
]

Message = Mapping[str, Any]
ToolCall = tuple[str, str]

_BILLING_HEADER = "x-anthropic-billing-header"
_STAND_INS = ("?", "!")
_MARKED = re.compile(r"(?P<before>\s*<(?P<name>\w+)>)(?P<text>.*)(?P<after></(?P=name)>\s*)", re.DOTALL)
_TEXT_TYPES = ("text", "input_text", "output_text")


class NotText(Exception):
    """A message has a part that is not text."""


def texts_of(content: Any) -> list[str]:
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


def reasoning_of(message: Message) -> str:
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


def encoded(text: str) -> bytes:
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
        texts = texts_of(message.get("content"))
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
            data = encoded(each)
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
        texts = texts_of(message.get("content"))
        return self._is_reasoned_by(message) and self.text.strip() in ("".join(texts).strip(), "\n".join(texts).strip())

    def added_by(self, message: Message) -> str:
        """Return what a message has behind this answer, which it means; empty if it means another, or has nothing."""
        text, said = "".join(texts_of(message.get("content"))).strip(), self.text.lstrip()
        # Templates write tool calls behind the text, where nothing can be added to it.
        if not said or self.tool_calls or not text.startswith(said) or not self._is_reasoned_by(message):
            return ""
        return text.removeprefix(said)

    def _is_reasoned_by(self, message: Message) -> bool:
        return canonical_calls(message.get("tool_calls")) == self.tool_calls and reasoning_of(message).strip() in (
            "",
            self.reasoning.strip(),
        )


def with_reasoning(messages: Sequence[Message], reasoning: Mapping[int, str]) -> Sequence[Message]:
    """Return the messages, with the reasoning that the model gave in those whose client has left it out."""
    missing = {position: text for position, text in reasoning.items() if not reasoning_of(messages[position])}
    if not missing:
        return messages
    return [
        {**message, "reasoning": missing[position], "reasoning_content": missing[position]}
        if position in missing
        else message
        for position, message in enumerate(messages)
    ]


def _marked(message: Message) -> re.Match[str] | None:
    return _MARKED.fullmatch("".join(texts_of(message.get("content"))))


def is_marked(message: Message) -> bool:
    """Tell whether a text has marks around it, such as those of a tool's result, which templates look for."""
    return _marked(message) is not None


def stand_in_for(message: Message) -> dict[str, Any]:
    """Return a message like this one, with another text: what a template makes of both alike does not depend on it."""
    text, marked = "".join(texts_of(message.get("content"))), _marked(message)
    before, text, after = marked.group("before", "text", "after") if marked else ("", text, "")
    other = before + next(each for each in _STAND_INS if not text.lstrip().startswith(each)) + after
    content = other if not isinstance(message.get("content"), list) else [{"type": "text", "text": other}]
    return {**message, "content": content}
