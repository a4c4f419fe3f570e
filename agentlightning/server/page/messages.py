"""The messages of a rendered prompt, read from the markers that its chat template has put between them.

The store has what the template made of the messages, and not these themselves. So a role is what the text says: a
message that contains a marker looks like several. The page says so, and has the text itself one click away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from agentlightning.drift import cut_thoughts

__all__ = ["Message", "Part", "Shown", "answer_parts", "message_start", "messages_of", "shown_of"]

Kind = Literal["text", "reasoning", "call", "result"]

# How templates begin a message; the first group that is set is its role. A whole marker, never less: texts have tags.
_START = re.compile(
    r"<\|im_start\|>(\w{1,20})[^\S\n]*\n?"
    r"|<\|(?:start_header_id|header_start)\|>(\w{1,20})<\|(?:end_header_id|header_end)\|>\n{0,2}"
    r"|<start_of_turn>(\w{1,20})\n?"
    r"|<\|start\|>(\w{1,20}[^<>\n]{0,80})(?=<\||\Z)"
    r"|<\|(system|user|assistant|tool|observation|developer)\|>\n?"
    r"|<\uff5c(User|Assistant|tool▁outputs▁begin)\uff5c>"
    r"|(\[/?INST\]|\[SYSTEM_PROMPT\]|\[TOOL_RESULTS\]|\[AVAILABLE_TOOLS\])"
)
# How they end one.
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"),
    *("<|end_of_text|>", "<end_of_turn>", "</s>", "<\uff5cend▁of▁sentence\uff5c>", "<\uff5ctool▁outputs▁end\uff5c>"),
    *("[/SYSTEM_PROMPT]", "[/TOOL_RESULTS]", "[/AVAILABLE_TOOLS]"),
)
MOST_ENDS = 4
_BEFORE_ALL = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\uff5cbegin▁of▁sentence\uff5c>|\[gMASK\]<sop>)?\s?")
_ROLES = {
    "model": "assistant",
    "[/inst]": "assistant",
    "[inst]": "user",
    "[system_prompt]": "system",
    "[available_tools]": "system",
    "developer": "system",
    "[tool_results]": "tool",
    "tool▁outputs▁begin": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
}
# Harmony puts a channel between the role and the text, and the recipient of a call behind the role.
_CHANNEL = re.compile(r"<\|channel\|>(\w+)([^<]*)(?:<\|constrain\|>\w+)?<\|message\|>|<\|message\|>")
_RECIPIENT = re.compile(r"to=([\w.\-]+)")
_RESULT = "<tool_response>", "</tool_response>"
_CALL = "<tool_call>", "</tool_call>"
# What follows one of these is a call, or a list of them, up to the end.
_LAST_CALLS = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")
_NAMED = re.compile(r"([\w.\-]{1,100})\[ARGS\]")
# Longer ones are shown as they are.
LARGEST_JSON = 200_000
# Of a message, and of each part: a model may write as many calls as it likes.
MOST_PARTS, FEWEST_CHARACTERS, NAME_CHARACTERS = 20, 200, 200
_THINKS = ("<think>", "[THINK]", "<thinking>", "<seed:think>")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message.

    Attributes:
        kind: `call` and `result` are of tools.
        name: the tool that is called; empty where that is unknown.
    """

    kind: Kind
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A message; `role` is None for text in which no marker names one."""

    role: str | None
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Shown:
    """Messages as the page shows them: shortened, with the number of characters and of messages left out."""

    messages: Sequence[Message]
    characters_left_out: int = 0
    messages_left_out: int = 0
    left_out_behind: int = 0


def message_start(text: str, position: int) -> int:
    """Return where the message begins in which a position is; 0 where no marker is before it."""
    # The header that a position is in belongs to the message, too.
    window = max(0, position - (1 << 16))
    found = [each.start() for each in _START.finditer(text, window, min(len(text), position + 64))]
    before = [each for each in found if each <= position]
    if before or not window:
        return before[-1] if before else 0
    return max((each.start() for each in _START.finditer(text, 0, window)), default=0)


def messages_of(text: str) -> list[Message]:
    """Cut a rendered prompt, or a part of one that begins between two messages, into messages."""
    found: list[Message] = []
    starts = [*_START.finditer(text)]
    before = text[: starts[0].start()] if starts else text
    rest = _without_end(before)
    if rest := rest[_matched(_BEFORE_ALL, rest) :]:
        found.append(Message(None, [Part("text", rest)]))
    for number, start in enumerate(starts):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(text)
        header = next(group for group in start.groups() if group is not None)
        found += _messages(header, text[start.end() : end])
    return found


def answer_parts(text: str, prompt_end: str = "") -> list[Part]:
    """Cut an answer into reasoning, text and calls of tools.

    Args:
        prompt_end: the end of its prompt, which may have opened the reasoning.
    """
    opened = prompt_end.rstrip()
    if opened.endswith(_THINKS) and not any(f"</{each[1:]}" in text for each in ("<think>", "<thinking>")):
        return [Part("reasoning", text)] if text else []
    return _assistant_parts(text)


def shown_of(messages: Sequence[Message], characters: int, most: int = 12) -> Shown:
    """Shorten messages to some number of characters in all: of many, the first and the last are shown."""
    behind = 2
    kept = [*messages] if len(messages) <= most else [*messages[:behind], *messages[behind - most :]]
    parts = [each.parts[:MOST_PARTS] for each in kept]
    limit = max(characters // max(sum(map(len, parts)), 1), FEWEST_CHARACTERS)
    short = [
        Message(each.role, [Part(part.kind, part.text[:limit], part.name[:NAME_CHARACTERS]) for part in some])
        for each, some in zip(kept, parts, strict=True)
    ]
    left_out = sum(map(_length, kept)) - sum(map(_length, short))
    return Shown(short, left_out, len(messages) - len(kept), behind)


def _length(message: Message) -> int:
    return sum(len(part.text) for part in message.parts)


def _messages(header: str, text: str) -> Iterator[Message]:
    name = header.split()[0].split("to=")[0] if header.split() else header
    role = _ROLES.get(name.lower(), name.lower())
    content = _without_end(text)
    if header.startswith("functions."):
        role = "tool"
    if channel := _CHANNEL.match(content):
        # Harmony: <|start|>assistant<|channel|>analysis<|message|>...
        content = content[channel.end() :]
        called = _RECIPIENT.search(header) or _RECIPIENT.search(channel[2] or "")
        if role == "assistant" and called:
            yield Message(role, [Part("call", _pretty(content), called[1].removeprefix("functions."))])
            return
        if role == "assistant" and channel[1] == "analysis":
            yield Message(role, [Part("reasoning", content)])
            return
    if role == "assistant":
        if parts := _assistant_parts(content):
            yield Message(role, parts)
        return
    parts = [*_between(content, *_RESULT)] if role in ("user", "tool") else []
    if any(is_result for is_result, _ in parts) and not any(each.strip() for is_result, each in parts if not is_result):
        # Templates of Qwen and others send results in the name of the user.
        yield Message("tool", [Part("result", _pretty(each.strip())) for is_result, each in parts if is_result])
    elif role == "tool":
        yield Message(role, [Part("result", _pretty(content))])
    elif content.strip():
        yield Message(role, [Part("text", content)])


def _assistant_parts(text: str) -> list[Part]:
    found: list[Part] = []
    for is_thought, each in cut_thoughts(text):
        if is_thought:
            if each.strip():
                found.append(Part("reasoning", each.strip("\n")))
        else:
            found += _with_calls(each)
    return found


def _with_calls(text: str) -> Iterator[Part]:
    last = _LAST_CALLS.search(text)
    for is_call, each in _between(text[: last.start()] if last else text, *_CALL):
        if is_call:
            yield from _calls(each.strip())
        elif said := each.strip("\n"):
            yield Part("text", said)
    if last:
        yield from _calls(text[last.end() :].strip())


def _between(text: str, opener: str, closer: str) -> Iterator[tuple[bool, str]]:
    """Cut a text into what is between two marks and what is not; what is not closed goes on to the end."""
    position = 0
    while (opened := text.find(opener, position)) >= 0:
        yield False, text[position:opened]
        closed = text.find(closer, opened)
        yield True, text[opened + len(opener) : closed if closed >= 0 else len(text)]
        if closed < 0:
            return
        position = closed + len(closer)
    yield False, text[position:]


def _without_end(text: str) -> str:
    for _ in range(MOST_ENDS):
        bare = text.rstrip()
        ended = next((each for each in _ENDS if bare.endswith(each)), None)
        if ended is None:
            break
        text = bare[: -len(ended)]
    return text


def _matched(pattern: re.Pattern[str], text: str) -> int:
    """Return how many characters a pattern matches at the beginning of a text."""
    found = pattern.match(text)
    return found.end() if found else 0


def _calls(written: str) -> Iterator[Part]:
    """Yield the calls in what a model wrote as one; as it wrote them where they are no JSON."""
    if named := _NAMED.match(written):
        yield Part("call", _pretty(written[named.end() :]), named[1])
        return
    value = _parsed(written)
    calls = cast("list[Any]", value) if isinstance(value, list) else [value]
    for each in calls:
        call = cast("dict[str, Any]", each) if isinstance(each, dict) else {}
        inner = call.get("function")
        call = cast("dict[str, Any]", inner) if isinstance(inner, dict) else call
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if not isinstance(name, str) or arguments is None:
            yield Part("call", written)
            return
        yield Part("call", _pretty(arguments if isinstance(arguments, str) else json.dumps(arguments)), name)


def _parsed(text: str) -> Any:
    if len(text) > LARGEST_JSON or text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _pretty(text: str) -> str:
    """Indent a JSON object or array; return any other text unchanged."""
    value = _parsed(text)
    try:
        return text if value is None else json.dumps(value, indent=2, ensure_ascii=False)
    except RecursionError:
        return text
