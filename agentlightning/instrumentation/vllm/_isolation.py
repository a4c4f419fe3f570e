"""What of ours fails while a server serves never costs a client its answer: vLLM goes on without it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = ["contained", "contained_async", "failures"]

logger = logging.getLogger("agentlightning")

T = TypeVar("T")

failures: Counter[str] = Counter()
"""How often, by kind, something of ours failed and vLLM went on without it: the answer went out as vLLM made it."""


def contained(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """Return `function(*args, **kwargs)`, or None where it raises: vLLM goes on. Counted, and logged once a kind."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        _note_failure(what, error)
        return None


async def contained_async(what: str, function: Callable[..., Awaitable[T]], *args: Any) -> T | None:
    """The same for what must be awaited."""
    try:
        return await function(*args)
    except Exception as error:
        _note_failure(what, error)
        return None


def _note_failure(what: str, error: Exception) -> None:
    kind = f"{what}: {type(error).__name__}"
    failures[kind] += 1
    if failures[kind] == 1:
        logger.exception("agentlightning: %s failed, and vLLM goes on without it (said once)", what)
