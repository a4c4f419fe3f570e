"""Sampling parameters that a server, or a rollout, may have pinned: their names, valid values, and form as text.

temperature=1,top_p=1,top_k=-1,min_p=0,repetition_penalty=1
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from _agentlightning import INSTRUMENT_OFF

__all__ = ["NEUTRAL", "Pins", "Policy", "is_same", "parse_pins", "parse_policy", "pins_for", "text_of"]

Pins = Mapping[str, float]
"""Parameters by name, in the order of the table below."""
Mode = Literal["off", "report", "rollout", "pin"]

CLIENT = "client"
"""A stand-in for pins: whatever a client asks for, as without pinning."""
_MODES = {"train", "val", "test"}


class _Parameter(NamedTuple):
    """A parameter that the distribution depends on which a token is drawn from.

    Attributes:
        neutral: the value that leaves the model's own distribution as it is.
        is_valid: whether a finite number can be its value, in each release of vLLM.
        otherwise: what an invalid value is not.
    """

    neutral: float
    is_valid: Any
    otherwise: str


_PARAMETERS: Mapping[str, _Parameter] = {
    # vLLM itself makes 0.01 of what is nearer to 0.
    "temperature": _Parameter(1.0, lambda value: value == 0 or 0.01 <= value <= 2, "0, or a number from 0.01 to 2"),
    "top_p": _Parameter(1.0, lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    # The engine has it as an int32.
    "top_k": _Parameter(
        -1,
        lambda value: -1 <= value < 2**31 and value == int(value),
        "a whole number up to 2147483647, or -1 for all",
    ),
    "min_p": _Parameter(0.0, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": _Parameter(1.0, lambda value: 0 < value <= 2, "a number above 0, up to 2"),
    "presence_penalty": _Parameter(0.0, lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "frequency_penalty": _Parameter(0.0, lambda value: -2 <= value <= 2, "a number from -2 to 2"),
}
NEUTRAL: Pins = {name: parameter.neutral for name, parameter in _PARAMETERS.items()}
"""The values with which tokens are drawn from the model's own distribution."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The treatment of the sampling parameters of requests by a server.

    Attributes:
        mode: `off`; `report`: count those that differ, and change none; `rollout`: pin those that a request's rollout
            names; `pin`: also pin them for a rollout that names none, and for no rollout.
        pins: what those requests are compared with, or get.
    """

    mode: Mode = "off"
    pins: Pins = field(default_factory=lambda: NEUTRAL)

    @property
    def is_on(self) -> bool:
        return self.mode != "off"

    def __str__(self) -> str:
        return text_of(self.pins) if self.mode == "pin" else self.mode


def parse_policy(text: str) -> Policy:
    """Parse the value of `AGL_SAMPLING`.

    Raises:
        ValueError: says in a clause what it is not.
    """
    text = text.lower()
    if text in INSTRUMENT_OFF:
        return Policy()
    if text == "report":
        return Policy("report")
    return Policy("rollout", {}) if text == "rollout" else Policy("pin", parse_pins(text))


def parse_pins(text: str) -> Pins:
    """Parse `NAME=VALUE,NAME=VALUE`; `client` stands for no pins.

    Raises:
        ValueError: says in a clause what is wrong.
    """
    found: dict[str, Any] = {}
    if text.strip() == CLIENT:
        return found
    for member in text.split(","):
        name, equals, value = (part.strip() for part in member.partition("="))
        if not equals:
            raise ValueError(f"{member.strip()!r} is not NAME=VALUE")
        if name in found:
            raise ValueError(f"{name} is there twice")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return _valid(found)


def _valid(values: Mapping[str, Any]) -> Pins:
    """Return parameters as pins, in their order.

    Raises:
        ValueError: says in a clause which name or value is wrong.
    """
    for name, value in values.items():
        parameter = _PARAMETERS.get(name)
        if parameter is None:
            raise ValueError(f"{name!r:.50} is not one of {', '.join(_PARAMETERS)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        if not is_number or not parameter.is_valid(value):
            raise ValueError(f"{name}={value!s:.50} is not {parameter.otherwise}")
    return {name: _normal(name, values[name]) for name in _PARAMETERS if name in values}


def pins_for(wanted: Any, mode: str | None) -> Pins | None:
    """Return the pins of a rollout, and validate those of other modes, too.

    Args:
        wanted: a mapping of parameters, or `client`; or a mapping of these by the rollout's mode. None for none.
        mode: of the rollout: `train`, `val` or `test`.

    Raises:
        ValueError: says in a clause what is wrong.
    """
    if not (isinstance(wanted, Mapping) and wanted.keys() & _MODES):
        return _pins_of(wanted)
    by_mode = cast("Mapping[str, Any]", wanted)
    for name in by_mode:
        if name not in _MODES:
            raise ValueError(f"{name!r:.50} stands beside modes, and is none of {', '.join(sorted(_MODES))}")
    return {name: _pins_of(each) for name, each in by_mode.items()}.get(mode or "")


def _pins_of(wanted: Any) -> Pins | None:
    if wanted is None:
        return None
    if wanted == CLIENT:
        return {}
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{wanted!r:.50} is neither {CLIENT!r} nor an object of parameters")
    return _valid(cast("Mapping[str, Any]", wanted))


def text_of(pins: Pins) -> str:
    """Write pins as `parse_pins` reads them."""
    return ",".join(f"{name}={value:.12g}" for name, value in pins.items()) or CLIENT


def is_same(name: str, value: Any, pinned: float) -> bool:
    """Tell whether a request's value of a parameter means what the pinned one does."""
    found = _normal(name, value)
    if found == pinned or name == "top_k":
        return found == pinned
    # The engine has all others as float32, and the Rust frontend sends them so.
    one, other = array("f", [found, pinned])
    return one == other


def _normal(name: str, value: float) -> float:
    # 0 and -1 both stand for all, in most releases.
    return (int(value) if value > 0 else -1) if name == "top_k" else float(value)
