"""Streams of server-sent events: edit some chunks, and split events that ids make too long; all others pass unread.

A client that reads a stream line by line limits the length of a line, Python's own `asyncio` to 64 KiB. The ids of a
long prompt exceed that, in a stream whose client has never asked for ids. Such an event is sent without them; further
events of the same shape carry them, none of them longer than any client reads.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from agentlightning.instrumentation.vllm._isolation import contained

__all__ = [
    "IDS_PER_EVENT",
    "LIMIT",
    "as_json",
    "edit_event",
    "edit_stream",
    "event_of",
    "has_list",
    "is_long",
    "parse",
    "split_ids",
    "split_long_events",
]

LIMIT = 1 << 16
"""The most bytes of an event that carries ids for which the client has not asked."""

IDS_PER_EVENT = 4096
"""At most 32 KiB of JSON: the rest is room for the other fields of an event."""

ID_LISTS = ("prompt_token_ids", "token_ids")
"""The lists that are moved out of an event, in this order, until it is short enough."""

# The empty values of a choice's fields.
_EMPTY: dict[str, Any] = {"delta": {}, "text": "", "token_ids": []}


async def edit_stream(
    stream: AsyncGenerator[str, None], key: str, change: Callable[[dict[str, Any]], None]
) -> AsyncGenerator[str, None]:
    """Yield the events of vLLM's stream, with `change` applied to each chunk that holds a list under `key`.

    All others pass unread, and so does a chunk that cannot be edited. One event stays one event, and closing this
    generator closes vLLM's.
    """
    async with aclosing(stream):
        async for event in stream:
            yield (contained("editing a stream", edit_event, event, change) or event) if has_list(event, key) else event


def has_list(event: str, key: str) -> bool:
    """Tell whether a chunk holds a list under `key`.

    A list and not null, which every chunk of a completions stream has: so most chunks are never parsed. A model's text
    cannot look like this, since JSON escapes its quotes.
    """
    return f'"{key}":[' in event


def edit_event(event: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Return the event with its chunk changed."""
    chunk = parse(event)
    change(chunk)
    return event_of(chunk)


def parse(event: str) -> dict[str, Any]:
    """Return the chunk in an event of chat or completions."""
    return json.loads(event.removeprefix("data: "))


def event_of(chunk: dict[str, Any]) -> str:
    """Return the event of a chunk."""
    return f"data: {as_json(chunk)}\n\n"


def as_json(value: dict[str, Any]) -> str:
    """Encode as pydantic does, unescaped and without spaces: an edited event differs only where it was edited."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def is_long(event: str) -> bool:
    """Tell whether an event has more than `LIMIT` bytes."""
    # A character has at most four bytes, and most events are short.
    return len(event) * 4 > LIMIT and (len(event) > LIMIT or len(event.encode()) > LIMIT)


def split_ids(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Split lists of ids into parts of at most `IDS_PER_EVENT` ids; concatenated by position, they are whole again.

    Args:
        fields: lists of ids, or lists of such lists, or lists of mappings like this one.
    """
    for start in range(0, _count(fields), IDS_PER_EVENT):
        part, _ = _slice(fields, start, start + IDS_PER_EVENT)
        yield part


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        value = value.values()
    elif not value or isinstance(value[0], int):
        return len(value)
    return sum(map(_count, value))


def _slice(value: Any, start: int, stop: int) -> tuple[Any, int]:
    """Return the ids from `start` to `stop` in a value, in its shape, and how many ids the value has."""
    if isinstance(value, Mapping):
        named: dict[str, Any] = {}
        passed = 0
        for name, each in value.items():
            part, count = _slice(each, start - passed, stop - passed)
            passed += count
            if _count(part):
                named[name] = part
        return named, passed
    if not value or isinstance(value[0], int):
        return value[max(start, 0) : max(stop, 0)], len(value)
    listed: list[Any] = []
    passed = 0
    for each in value:
        part, count = _slice(each, start - passed, stop - passed)
        passed += count
        listed.append(part)
    return listed, passed


async def split_long_events(stream: AsyncGenerator[str, None], name: str) -> AsyncGenerator[str, None]:
    """Yield the events of vLLM's stream, with ids moved to further events where they make one too long.

    Short events pass unread. Closing this generator closes vLLM's.

    Args:
        stream: events with chunks that have choices.
        name: the route, for the log.
    """
    async with aclosing(stream):
        async for event in stream:
            if is_long(event) and any(has_list(event, key) for key in ID_LISTS):
                for each in contained(f"{name}: splitting a long event", _split, event) or (event,):
                    yield each
            else:
                yield event


def _split(event: str) -> list[str]:
    chunk = parse(event)
    choices: list[dict[str, Any]] = chunk["choices"]
    # Without fields that are sent once, such as usage.
    like = {key: value for key, value in chunk.items() if isinstance(value, (str, int))}
    more: list[str] = []
    for key in ID_LISTS:
        for holder in (chunk, *choices):
            ids = holder.get(key)
            if not ids or not is_long(event):
                continue
            holder[key] = None if key == "prompt_token_ids" else []
            for part in split_ids({key: ids}):
                if holder is chunk:
                    more.append(event_of({**like, "choices": [*map(_emptied, choices)], **part}))
                else:
                    more.append(event_of({**like, "choices": [{**_emptied(holder), **part}]}))
            event = event_of(chunk)
    # Nothing of a choice may follow the chunk that ends it.
    ends = any(choice.get("finish_reason") for choice in choices)
    return [*more, event] if ends else [event, *more]


def _emptied(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice of the same shape that adds nothing."""
    return {key: value if key == "index" else _EMPTY.get(key) for key, value in choice.items()}
