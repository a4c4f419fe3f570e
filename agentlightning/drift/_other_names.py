"""Names of breaks in other projects: Agent Lightning 0.3, and miles."""

from __future__ import annotations

from array import array

from agentlightning.drift._classification import Difference
from agentlightning.token_text import TokenTexts

__all__ = ["MISMATCHES", "SESSION_MISMATCHES", "mismatches", "session_mismatch"]

MISMATCHES = ("template", "retoken", "others")
"""The names of Agent Lightning 0.3."""
SESSION_MISMATCHES = ("special_token_count", "special_token_type", "non_assistant_text", "assistant_text")
"""The names of miles."""


def mismatches(before: array[int], prompt: array[int], position: int, texts: TokenTexts | None) -> list[str]:
    """Name a break as Agent Lightning 0.3 does."""
    if texts is None:
        return []
    special = texts.special
    one, other = before[position:], prompt[position:]
    pairs = zip([each for each in one if each in special], [each for each in other if each in special], strict=False)
    found = ["template"] if any(each != beside for each, beside in pairs) else []
    content, beside = ([each for each in side if each not in special] for side in (one, other))
    if beside[: len(content)] != content:
        found.append("retoken" if texts.join(beside).startswith(texts.join(content)) else "others")
    return found


def session_mismatch(found: Difference) -> str:
    """Name a break as miles does."""
    if found.cause == "template":
        return f"special_token_{'count' if found.special_before != found.special_after else 'type'}"
    return "assistant_text" if found.role in ("assistant", "model") else "non_assistant_text"
