"""Streams of server-sent events, in which some chunks are changed and the others pass unread."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from agentlightning.instrumentation.vllm._isolation import contained

__all__ = ["IDS_PER_EVENT", "LIMIT", "as_json", "edit", "edited", "has_list", "is_long", "parts", "read", "split"]


async def edited(
    stream: AsyncGenerator[str, None], key: str, change: Callable[[dict[str, Any]], None]
) -> AsyncGenerator[str, None]:
    """An SSE stream of vLLM's in which `change` has changed each chunk that holds a list under `key`.

    The others pass untouched and unread, and so does a chunk that cannot be edited. The chunks of one event stay one
    event, and closing this generator closes vLLM's.
    """
    async with aclosing(stream):
        async for event in stream:
            yield (contained("editing a stream", edit, event, change) or event) if has_list(event, key) else event


def has_list(event: str, key: str) -> bool:
    """Whether a chunk holds a list under `key`.

    Not null, as in every chunk of a completions stream: most chunks are never read. What a model says cannot look like
    it, since JSON escapes its quotes.
    """
    return f'"{key}":[' in event


def edit(event: str, change: Callable[[dict[str, Any]], None]) -> str:
    """The event with its chunk changed."""
    chunk = read(event)
    change(chunk)
    return f"data: {as_json(chunk)}\n\n"


def read(event: str) -> dict[str, Any]:
    """The chunk that an event of chat or completions carries."""
    return json.loads(event.removeprefix("data: "))


def as_json(event: dict[str, Any]) -> str:
    """As pydantic writes it, not escaped and without spaces: an event that was edited differs only where it was."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


# Streams whose ids would make an event longer than clients read as one line: the ids go into events of their own.
#
# A client that reads a stream line by line has a limit for a line, 64 KiB in Python's own `asyncio`. The ids of a long
# prompt pass it, in a stream whose client has never asked for ids. Such an event goes out without them; further events
# of the same shape carry them, and are no longer than any client reads.

LIMIT = 1 << 16
"""The most bytes of an event that carries ids which nobody has asked for."""

IDS_PER_EVENT = 4096
"""At most 32 KiB of JSON: the rest is room for what else an event says."""

IDS = ("prompt_token_ids", "token_ids")
"""The lists that leave an event that is too long, in this order, for as long as it is."""

# What a choice says that says nothing.
_SILENT: dict[str, Any] = {"delta": {}, "text": "", "token_ids": []}


def is_long(event: str) -> bool:
    """Whether an event has more bytes than `LIMIT`."""
    # A character has four bytes at most, and most events are short.
    return len(event) * 4 > LIMIT and (len(event) > LIMIT or len(event.encode()) > LIMIT)


def parts(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lists of ids in parts of at most `IDS_PER_EVENT` ids each: joined, position by position, they are whole again.

    Args:
        fields: lists of ids, or lists of such lists, or lists of mappings like this one.
    """
    for start in range(0, _count(fields), IDS_PER_EVENT):
        part, _ = _part(fields, start, start + IDS_PER_EVENT)
        yield part


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        value = value.values()
    elif not value or isinstance(value[0], int):
        return len(value)
    return sum(map(_count, value))


def _part(value: Any, start: int, stop: int) -> tuple[Any, int]:
    """The ids from `start` to `stop` of those in a value, in its shape, and how many ids the value has."""
    if isinstance(value, Mapping):
        named: dict[str, Any] = {}
        passed = 0
        for name, each in value.items():
            part, count = _part(each, start - passed, stop - passed)
            passed += count
            if _count(part):
                named[name] = part
        return named, passed
    if not value or isinstance(value[0], int):
        return value[max(start, 0) : max(stop, 0)], len(value)
    listed: list[Any] = []
    passed = 0
    for each in value:
        part, count = _part(each, start - passed, stop - passed)
        passed += count
        listed.append(part)
    return listed, passed


async def split(stream: AsyncGenerator[str, None], name: str) -> AsyncGenerator[str, None]:
    """An SSE stream of chunks with choices, each of which is as short as it would be without ids.

    Chunks that are short enough pass unread. Closing this generator closes vLLM's.

    Args:
        stream: vLLM's, with ids.
        name: the route, for the log.
    """
    async with aclosing(stream):
        async for event in stream:
            if is_long(event) and any(has_list(event, key) for key in IDS):
                for each in contained(f"{name}: splitting a long event", _split, event) or (event,):
                    yield each
            else:
                yield event


def _split(event: str) -> list[str]:
    chunk = read(event)
    choices: list[dict[str, Any]] = chunk["choices"]
    # Without what is said once, such as usage.
    like = {key: value for key, value in chunk.items() if isinstance(value, (str, int))}
    more: list[str] = []
    for key in IDS:
        for holder in (chunk, *choices):
            ids = holder.get(key)
            if not ids or not is_long(event):
                continue
            holder[key] = None if key == "prompt_token_ids" else []
            for part in parts({key: ids}):
                if holder is chunk:
                    more.append(_event({**like, "choices": [*map(_silent, choices)], **part}))
                else:
                    more.append(_event({**like, "choices": [{**_silent(holder), **part}]}))
            event = _event(chunk)
    # Nothing of a choice comes after what ends it.
    ends = any(choice.get("finish_reason") for choice in choices)
    return [*more, event] if ends else [event, *more]


def _silent(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice like this one that says nothing."""
    return {key: value if key == "index" else _SILENT.get(key) for key, value in choice.items()}


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {as_json(chunk)}\n\n"
