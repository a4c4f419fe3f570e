"""What this shell's `AGL_*` variables ask for."""

from __future__ import annotations

from collections.abc import Iterator

from _agentlightning import INSTRUMENT_OFF
from agentlightning import settings
from agentlightning.doctor import Finding, Mark

__all__ = ["findings"]


def findings() -> Iterator[Finding]:
    """One for each variable that is set to something, and for `AGL_INSTRUMENT` in any case."""
    for variable, allowed in settings.VARIABLES.items():
        value, complaint = settings.read(variable), settings.complaint(variable)
        if complaint:
            advice = (
                f"set {variable} to one of these, or unset it" if allowed.values else f"correct or unset {variable}"
            )
            yield Finding(variable, Mark.PROBLEM, complaint, advice)
        elif variable == "AGL_INSTRUMENT" and value in INSTRUMENT_OFF:
            there = f"{value} in this shell" if value else "not set in this shell"
            yield Finding(variable, Mark.NOTE, f"{there}: `vllm serve` needs it, `agl vllm serve` sets it")
        elif variable == "AGL_RETURN_TOKEN_IDS" and value == "none":
            yield Finding(variable, Mark.NOTE, "none: answers carry ids only where a request asks for them")
        elif value:
            yield Finding(variable, Mark.OK, "set" if allowed.secret else settings.without_secrets(value))
