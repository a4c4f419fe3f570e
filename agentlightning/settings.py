"""Every `AGL_*` variable, read in one place."""

from __future__ import annotations

import logging
import os

from agentlightning import INSTRUMENT_OFF

INSTRUMENT_ON = ("1", "true", "on", "yes")
RETURN_TOKEN_IDS = ("all", "response", "none")

_warned: set[str] = set()


def instrument() -> str:
    """What `AGL_INSTRUMENT` asks for: `"off"`, `"on"` or `"strict"`; off, with one warning, for anything else."""
    value = read("AGL_INSTRUMENT")
    if value in INSTRUMENT_OFF:
        return "off"
    if value in INSTRUMENT_ON:
        return "on"
    if value == "strict":
        _warn_once(
            "AGL_INSTRUMENT",
            "AGL_INSTRUMENT=strict cannot refuse a server yet that is not patched whole; it counts as 'on'",
        )
        return "strict"
    return _fall_back("AGL_INSTRUMENT", "off", (*INSTRUMENT_ON, "strict", *INSTRUMENT_OFF[1:]))


def return_token_ids() -> str:
    """What answers carry when a request does not say (`AGL_RETURN_TOKEN_IDS`).

    `"all"` (the default): prompt and response ids; `"response"`: no prompt ids; `"none"`: vLLM's own answer.
    Anything else counts as the default, with one warning.
    """
    value = read("AGL_RETURN_TOKEN_IDS")
    if value in RETURN_TOKEN_IDS:
        return value
    return _fall_back("AGL_RETURN_TOKEN_IDS", "all", RETURN_TOKEN_IDS) if value else "all"


def read(variable: str) -> str:
    """The variable's value without case or outer white space; empty where it is not set."""
    return os.environ.get(variable, "").strip().lower()


def _fall_back(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable)
    _warn_once(variable, f"{variable}={value!r} is none of {', '.join(allowed)}; it counts as {default!r}")
    return default


def _warn_once(variable: str, message: str) -> None:
    if variable not in _warned:
        _warned.add(variable)
        logging.getLogger("agentlightning").warning("agentlightning: %s", message)
