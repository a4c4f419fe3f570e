"""Every `AGL_*` variable, read in one place."""

from __future__ import annotations

import logging
import os

from agentlightning import INSTRUMENT_OFF

INSTRUMENT_ON = ("1", "true", "on", "yes")
RETURN_TOKEN_IDS = ("all", "response", "none")

ALLOWED = {
    "AGL_INSTRUMENT": (*INSTRUMENT_ON, "strict", *filter(None, INSTRUMENT_OFF)),
    "AGL_RETURN_TOKEN_IDS": RETURN_TOKEN_IDS,
}
"""Each variable's values; what is not set, or empty, counts as the default."""
DEFAULTS = {"AGL_INSTRUMENT": "off", "AGL_RETURN_TOKEN_IDS": "all"}

_warned: set[str] = set()


def instrument() -> str:
    """What `AGL_INSTRUMENT` asks for: `"off"`, `"on"` or `"strict"`."""
    value = _checked("AGL_INSTRUMENT")
    return "on" if value in INSTRUMENT_ON else "off" if value in INSTRUMENT_OFF else value


def return_token_ids() -> str:
    """What answers carry when a request does not say (`AGL_RETURN_TOKEN_IDS`).

    `"all"` (the default): prompt and response ids; `"response"`: no prompt ids; `"none"`: vLLM's own answer.
    """
    return _checked("AGL_RETURN_TOKEN_IDS")


def read(variable: str) -> str:
    """The variable's value without case or outer white space; empty where it is not set."""
    return os.environ.get(variable, "").strip().lower()


def complaint(variable: str) -> str | None:
    """What is wrong with the variable's value, in one sentence; None where it is allowed or not set."""
    if read(variable) in ("", *ALLOWED[variable]):
        return None
    allowed = ", ".join(ALLOWED[variable])
    return f"{variable}={os.environ[variable]!r} is none of {allowed}; it counts as {DEFAULTS[variable]!r}"


def _checked(variable: str) -> str:
    """The value where it is allowed, else the default, with one warning."""
    wrong = complaint(variable)
    if wrong is None:
        return read(variable) or DEFAULTS[variable]
    if variable not in _warned:
        _warned.add(variable)
        logging.getLogger("agentlightning").warning("agentlightning: %s", wrong)
    return DEFAULTS[variable]
