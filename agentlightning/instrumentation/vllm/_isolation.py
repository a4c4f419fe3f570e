"""Keep our exceptions away from clients: if our code fails, vLLM continues without it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = ["contained", "contained_async", "failures"]

logger = logging.getLogger("agentlightning")

T = TypeVar("T")

failures: Counter[str] = Counter()
"""Number of failures of our code, by kind; each answer went out as vLLM made it."""


def contained(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """Return `function(*args, **kwargs)`, or None if it raises. Failures are counted, and logged once per kind.

    Args:
        what: the kind of failure, for the log and the counter.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        _note_failure(what, error)
        return None


async def contained_async(what: str, function: Callable[..., Awaitable[T]], *args: Any) -> T | None:
    """Do the same for a function that is awaited."""
    try:
        return await function(*args)
    except Exception as error:
        _note_failure(what, error)
        return None


def _note_failure(what: str, error: Exception) -> None:
    kind = f"{what}: {type(error).__name__}"
    failures[kind] += 1
    if failures[kind] == 1:
        logger.exception(
            "agentlightning: %s failed; vLLM continues without it. Please report this error; it is logged once, and "
            "counted in the status",
            what,
        )
