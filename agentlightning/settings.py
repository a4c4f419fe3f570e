"""Every `AGL_*` variable, read in one place."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from _agentlightning import INSTRUMENT_OFF
from agentlightning.sampling import Policy, parse_policy

ON = ("1", "true", "on", "yes")
OFF = tuple(filter(None, INSTRUMENT_OFF))
WHOLE_MB = r"0*[1-9][0-9]{0,6}"
NOT_WHOLE_MB = "not a whole number from 1 to 9999999"


@dataclass(frozen=True, slots=True)
class Variable:
    """The values that one variable may have.

    Attributes:
        default: used if the variable is not set, is empty or has an invalid value.
        values: the valid values, in lower case; empty where `pattern` says them.
        pattern: a regular expression that a valid value matches.
        otherwise: how to describe an invalid value, where there is a `pattern`.
        parse: reads the value, or raises a `ValueError` that says what is wrong with it; in the place of a pattern.
        secret: never show the value.
    """

    default: str
    values: tuple[str, ...] = ()
    pattern: str = ""
    otherwise: str = ""
    parse: Callable[[str], object] | None = None
    secret: bool = False

    def objection(self, value: str) -> str | None:
        """Describe an invalid value; None for a valid one."""
        if self.parse is not None:
            try:
                self.parse(value)
            except ValueError as error:
                return f"not valid: {error}"
            return None
        if self.values:
            return None if value in self.values else f"not one of {', '.join(self.values)}"
        return None if re.fullmatch(self.pattern, value) else self.otherwise


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
    "AGL_RECORD_OFFLINE": Variable("off", (*ON, *OFF)),
    "AGL_QUEUE_MB": Variable("256", pattern=WHOLE_MB, otherwise=NOT_WHOLE_MB),
    "AGL_CONTINUE": Variable("off", (*ON, "report", *OFF)),
    "AGL_CONTINUE_REASONING": Variable("template", ("template", "keep")),
    "AGL_CONTINUE_MB": Variable("256", pattern=WHOLE_MB, otherwise=NOT_WHOLE_MB),
    "AGL_SAMPLING": Variable("off", parse=parse_policy),
    "AGL_MODEL_NAMES": Variable("served", ("served", "any")),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The variables that a server asks for while it serves, read at one moment; attributes as the functions below."""

    instrument: str
    return_token_ids: str
    store: str | None
    queue_bytes: int
    logprobs: bool
    record_text: bool
    record_offline: bool
    continues: str
    continue_reasoning: str
    continue_bytes: int
    sampling: Policy
    any_model_name: bool


def read_all() -> Settings:
    """Read them now: who serves requests keeps the result, and does not read the environment for each."""
    return Settings(
        instrument(),
        return_token_ids(),
        store(),
        queue_bytes(),
        logprobs(),
        record_text(),
        record_offline(),
        continues(),
        continue_reasoning(),
        continue_bytes(),
        sampling(),
        any_model_name(),
    )


def instrument() -> str:
    """Return what `AGL_INSTRUMENT` asks for: `"off"`, `"on"` or `"strict"`."""
    value = _valid("AGL_INSTRUMENT")
    return "on" if value in ON else "off" if value in OFF else value


def return_token_ids() -> str:
    """Return what answers carry when a request does not say (`AGL_RETURN_TOKEN_IDS`).

    `"all"` (the default): prompt and response ids; `"response"`: no prompt ids; `"none"`: vLLM's own answer.
    """
    return _valid("AGL_RETURN_TOKEN_IDS")


def store() -> str | None:
    """Return where generations are recorded (`AGL_STORE`), for `agentlightning.store.open_store`; None for nowhere.

    Show it only through `without_secrets`.
    """
    return _valid("AGL_STORE") or None


def store_key() -> str | None:
    """Return the key of a store that is served over HTTP (`AGL_STORE_KEY`); None if it has none."""
    return _valid("AGL_STORE_KEY") or None


def logprobs() -> bool:
    """Tell whether to record the sampled ids' logprobs even if nobody asked for them (`AGL_LOGPROBS`)."""
    return _valid("AGL_LOGPROBS") in ON


def record_text() -> bool:
    """Tell whether to record the text of prompts and answers beside their ids (`AGL_RECORD_TEXT`)."""
    return _valid("AGL_RECORD_TEXT") in ON


def record_offline() -> bool:
    """Tell whether to record what vLLM's `LLM` generates without a server (`AGL_RECORD_OFFLINE`)."""
    return _valid("AGL_RECORD_OFFLINE") in ON


def queue_bytes() -> int:
    """Return how many bytes may wait in memory for the store (`AGL_QUEUE_MB`, in MiB)."""
    return int(_valid("AGL_QUEUE_MB")) << 20


def continues() -> str:
    """Return whether chat prompts go on from the exact ids of earlier calls (`AGL_CONTINUE`).

    `"off"` (the default); `"report"`: only count which would; `"on"`.
    """
    value = _valid("AGL_CONTINUE")
    return "on" if value in ON else "off" if value in OFF else value


def continue_reasoning() -> str:
    """Return what becomes of reasoning that the chat template leaves out (`AGL_CONTINUE_REASONING`).

    `"template"` (the default): it is left out, in vLLM's own prompt; `"keep"`: the prompt goes on from it.
    """
    return _valid("AGL_CONTINUE_REASONING")


def continue_bytes() -> int:
    """Return how many bytes of earlier calls may be kept in memory (`AGL_CONTINUE_MB`, in MiB)."""
    return int(_valid("AGL_CONTINUE_MB")) << 20


def sampling() -> Policy:
    """Return what becomes of the sampling parameters of requests (`AGL_SAMPLING`)."""
    return parse_policy(_valid("AGL_SAMPLING"))


def any_model_name() -> bool:
    """Tell whether a request that names a rollout may call the model whatever it likes (`AGL_MODEL_NAMES`)."""
    return _valid("AGL_MODEL_NAMES") == "any"


def read(variable: str) -> str:
    """Return a variable's value, stripped, and in lower case unless case matters in it; empty if it is not set."""
    value = os.environ.get(variable, "").strip()
    return value.lower() if VARIABLES[variable].values else value


def objection(variable: str) -> str | None:
    """Say what is wrong with a variable's value, as a clause; None if it is valid or not set."""
    value = read(variable)
    wrong = VARIABLES[variable].objection(value) if value else None
    return wrong and f"{variable}={without_secrets(os.environ[variable])!r} is {wrong}"


def complaint(variable: str) -> str | None:
    """Say in one sentence what is wrong with a variable's value, and what is used instead; None if it is valid."""
    wrong, default = objection(variable), VARIABLES[variable].default
    instead = f"the default {default!r} is used" if default else "it is ignored"
    return wrong and f"{wrong}; {instead}"


def without_secrets(url: str) -> str:
    """Return a path or URL as it may be shown: without the user, password and options of a URL."""
    return re.sub(r"(?s)\?.*", "", re.sub(r"(?s)(://).*@", r"\1***@", url)) if "://" in url else url


def _valid(variable: str) -> str:
    """Return the value, or the default with one warning if the value is invalid."""
    return _validated(variable, os.environ.get(variable))


@functools.cache
def _validated(variable: str, value: str | None) -> str:
    """Do the same, once for each `value` that the variable has."""
    wrong = complaint(variable)
    if wrong is None:
        return read(variable) or VARIABLES[variable].default
    logging.getLogger("agentlightning").warning("agentlightning: %s", wrong)
    return VARIABLES[variable].default
