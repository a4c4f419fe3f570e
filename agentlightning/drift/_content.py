"""The texts of turns: their headers, reasoning, tool calls and tools. Whatever their length, in linear time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from agentlightning.common_prefix import common_length

__all__ = [
    "are_same_parts",
    "characters",
    "cut_thoughts",
    "defines_tools",
    "parts_of",
    "similarity_of",
    "split_header",
    "thoughts_in",
    "without_thoughts",
    "without_tools",
]

# What stands between the beginning of a turn and its content.
_HEADER = re.compile(
    r"\s*(?:\w+(?:<\|(?:end_header_id|header_end|message)\|>|<\|channel\|>\w+<\|message\|>)\n{0,2}"
    r"|(?:system|user|assistant|tool|developer|ipython|model|observation)\n)"
)
_THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
)
_CALL_MARK = re.compile(
    r"</?tool_calls?>|\[/?TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\]\w*|<\|python_tag\|>|<\uff5ctool▁[^\uff5c]*\uff5c>|<\|tool_call[^|]*\|>"
)
_WHITE = re.compile(r"\s+")
_OPEN_TOOLS, _CLOSE_TOOLS = "<tools>", "</tools>"
FAILURES_TO_PARSE = 16


def characters(text: str) -> str:
    """Return a text as an answer has it: what makes no character at its end is left out, several are as one."""
    return re.sub("\ufffd+", "\ufffd", text).rstrip("\ufffd")


def split_header(text: str) -> tuple[str, str]:
    found = _HEADER.match(text)
    return (found[0], text[found.end() :]) if found else ("", text)


def thoughts_in(text: str) -> list[str]:
    return [each.strip() for is_thought, each in cut_thoughts(text) if is_thought and each.strip()] or (
        [""] if any(is_thought for is_thought, _ in cut_thoughts(text)) else []
    )


def without_thoughts(text: str) -> str:
    return "".join(each for is_thought, each in cut_thoughts(text) if not is_thought)


def cut_thoughts(text: str) -> Iterator[tuple[bool, str]]:
    """Cut a text into what is reasoning and what is not."""
    for opener, closer in _THOUGHTS:
        opened, closed = text.find(opener), text.find(closer)
        if closed >= 0 and (opened < 0 or closed < opened):
            # The prompt had opened it.
            yield True, text[:closed]
            text = text[closed + len(closer) :]
            opened = text.find(opener)
        if opened < 0:
            continue
        while opened >= 0:
            yield False, text[:opened]
            closed = text.find(closer, opened)
            if closed < 0:
                yield True, text[opened + len(opener) :]
                return
            yield True, text[opened + len(opener) : closed]
            text = text[closed + len(closer) :]
            opened = text.find(opener)
    yield False, text


_Part = tuple[str | None, str]
"""A text, with None before it, or a tool call: its name, which may be unknown and empty, and its arguments."""


def parts_of(text: str) -> list[_Part]:
    """Return the parts of an answer, with tool calls in a form of which there is one."""
    found: list[_Part] = []
    for each in _CALL_MARK.split(text):
        part = each.strip()
        if not part:
            continue
        if part[0] in "[{" and (calls := _calls(part)) is not None:
            found += calls
        elif part.startswith("<function="):
            found.append(("", _WHITE.sub("", part)))
        else:
            found.append((None, part))
    return found


def _calls(part: str) -> list[_Part] | None:
    try:
        value = json.loads(part, parse_float=_number)
    except (ValueError, RecursionError):
        return None
    found: list[_Part] = []
    for each in cast("list[Any]", value) if isinstance(value, list) else [value]:
        if (written := _object(each)) is None:
            return [("", _canonical(value))]
        inner = _object(written.get("function"))
        call = written if inner is None else inner
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if isinstance(name, str) and arguments is not None:
            found.append((name, _canonical(_parsed(arguments))))
        else:
            found.append(("", _canonical(each)))
    return found


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments, parse_float=_number) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float:
    """Read a number; one without a fraction is the integer that it equals."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        return ""


def are_same_parts(one: Sequence[_Part], other: Sequence[_Part]) -> bool:
    """Tell whether answers have the same texts and tool calls, and at least one such call."""
    if len(one) != len(other) or all(name is None for name, _ in one):
        return False
    for (name, value), (other_name, other_value) in zip(one, other, strict=True):
        if value != other_value or (name is None) != (other_name is None):
            return False
        # An answer that was forced to be a call has its arguments alone.
        if name and other_name and name != other_name:
            return False
    return True


def without_tools(text: str) -> tuple[str, list[str]]:
    """Return a text without the tools that it defines, and these."""
    at = text.find("# Tools")
    opened = text.find(_OPEN_TOOLS)
    if at >= 0 and opened > at:
        # The sentence in front may name both tags, too.
        closed = text.rfind(_CLOSE_TOOLS)
        # With the sentences around them, which are there only where there are tools.
        return text[:at], [text[at : closed if closed >= 0 else len(text)]]
    rest, tools, decoder, failures = list[str](), list[str](), json.JSONDecoder(), 0
    position = 0
    while (at := text.find("{", position)) >= 0 and failures < FAILURES_TO_PARSE:
        rest.append(text[position:at])
        try:
            value, position = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, position = None, at + 1
            failures += 1
        if _is_tool(value):
            tools.append(_canonical(value))
        else:
            rest.append(text[at:position])
    return _WHITE.sub(" ", "".join([*rest, text[position:]])), tools


def defines_tools(turn: str) -> bool:
    """Tell whether a turn has nothing but tools in it."""
    rest, tools = without_tools(split_header(turn)[1])
    return bool(tools) and not rest.strip("[], ")


def _is_tool(value: Any) -> bool:
    outer = _object(value)
    inner = None if outer is None else _object(outer.get("function", outer))
    return inner is not None and "name" in inner and ("parameters" in inner or "input_schema" in inner)


def _object(value: Any) -> dict[str, Any] | None:
    """Return a JSON object; None for any other value."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def similarity_of(one: str, other: str) -> float:
    """Return the share of the longer text that both have in common at their beginnings and ends."""
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    front = common_length(one, other)
    return (front + common_length(one[front:][::-1], other[front:][::-1])) / longest
