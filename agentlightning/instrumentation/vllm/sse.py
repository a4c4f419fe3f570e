"""Streams of server-sent events, in which some chunks are changed and the others pass unread."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from agentlightning.instrumentation.vllm.containment import contained

__all__ = ["as_json", "edit", "edited", "has_list", "read"]


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
