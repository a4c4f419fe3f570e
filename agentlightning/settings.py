"""Every `AGL_*` variable, read in one place."""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass

from _agentlightning import INSTRUMENT_OFF

ON = ("1", "true", "on", "yes")
OFF = tuple(filter(None, INSTRUMENT_OFF))


@dataclass(frozen=True, slots=True)
class Variable:
    """What a variable may be.

    Attributes:
        default: what counts where it is not set, is empty or has a value that it may not have.
        values: what it may be, in lower case; empty where `pattern` says it.
        pattern: what it may look like.
        otherwise: what a value that it may not have is.
        secret: its value is shown nowhere.
    """

    default: str
    values: tuple[str, ...] = ()
    pattern: str = ""
    otherwise: str = ""
    secret: bool = False

    def allows(self, value: str) -> bool:
        return value in self.values if self.values else re.fullmatch(self.pattern, value) is not None

    @property
    def objection(self) -> str:
        return f"none of {', '.join(self.values)}" if self.values else self.otherwise


VARIABLES = {
    "AGL_INSTRUMENT": Variable("off", (*ON, "strict", *OFF)),
    "AGL_RETURN_TOKEN_IDS": Variable("all", ("all", "response", "none")),
    "AGL_STORE": Variable(
        "",
        pattern=r"(?s)(sqlite:///|postgresql://|https?://(?![/?#])).+|(?!\w[\w+.-]*://).+",
        otherwise="neither the path of a file nor sqlite:///PATH, postgresql://HOST/NAME or http(s)://HOST:PORT",
    ),
    "AGL_STORE_KEY": Variable("", pattern=r"(?s).+", secret=True),
    "AGL_LOGPROBS": Variable("off", (*ON, *OFF)),
    "AGL_RECORD_TEXT": Variable("on", (*ON, *OFF)),
    "AGL_QUEUE_MB": Variable("256", pattern=r"0*[1-9][0-9]{0,6}", otherwise="no whole number from 1 to 9999999"),
}


def instrument() -> str:
    """What `AGL_INSTRUMENT` asks for: `"off"`, `"on"` or `"strict"`."""
    value = _checked("AGL_INSTRUMENT")
    return "on" if value in ON else "off" if value in OFF else value


def return_token_ids() -> str:
    """What answers carry when a request does not say (`AGL_RETURN_TOKEN_IDS`).

    `"all"` (the default): prompt and response ids; `"response"`: no prompt ids; `"none"`: vLLM's own answer.
    """
    return _checked("AGL_RETURN_TOKEN_IDS")


def store() -> str | None:
    """Where generations are recorded (`AGL_STORE`), for `agentlightning.store.open_store`; None for nowhere.

    It is shown by way of `without_secrets` alone.
    """
    return _checked("AGL_STORE") or None


def store_key() -> str | None:
    """What a store that is served over HTTP asks for (`AGL_STORE_KEY`); None for nothing."""
    return _checked("AGL_STORE_KEY") or None


def logprobs() -> bool:
    """Whether the sampled ids' logprobs are recorded though nobody asked for them (`AGL_LOGPROBS`)."""
    return _checked("AGL_LOGPROBS") in ON


def record_text() -> bool:
    """Whether the text of prompts and answers is recorded beside their ids (`AGL_RECORD_TEXT`)."""
    return _checked("AGL_RECORD_TEXT") in ON


def queue_bytes() -> int:
    """How much may wait in memory for the store (`AGL_QUEUE_MB`, in MiB)."""
    return int(_checked("AGL_QUEUE_MB")) << 20


def read(variable: str) -> str:
    """The variable's value without outer white space, and in lower case unless it is a place; empty where not set."""
    value = os.environ.get(variable, "").strip()
    return value.lower() if VARIABLES[variable].values else value


def complaint(variable: str) -> str | None:
    """What is wrong with the variable's value, in one sentence; None where it is allowed or not set."""
    value, allowed = read(variable), VARIABLES[variable]
    if not value or allowed.allows(value):
        return None
    shown = repr(without_secrets(os.environ[variable]))
    counts = f"it counts as {allowed.default!r}" if allowed.default else "it counts as not set"
    return f"{variable}={shown} is {allowed.objection}; {counts}"


def without_secrets(url: str) -> str:
    """A path or URL as it may be shown: without the user, password and options of a URL."""
    return re.sub(r"(?s)\?.*", "", re.sub(r"(?s)(://).*@", r"\1***@", url)) if "://" in url else url


def _checked(variable: str) -> str:
    """The value where it is allowed, else the default, with one warning; quick, since every request asks."""
    return _judged(variable, os.environ.get(variable))


@functools.cache
def _judged(variable: str, value: str | None) -> str:
    """The same; `value` is what it is set to, so that another is judged anew."""
    wrong = complaint(variable)
    if wrong is None:
        return read(variable) or VARIABLES[variable].default
    logging.getLogger("agentlightning").warning("agentlightning: %s", wrong)
    return VARIABLES[variable].default
