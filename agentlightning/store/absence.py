"""The reason why no generation of a rollout has finished, as `agl doctor` and the page give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["IS_IT_CALLED", "NAME_IT", "UNDER_WAY", "Absence", "explain_absence"]

NAME_IT = "call http://HOST:PORT/rollout/ROLLOUT/v1, or send the header x-agl-rollout-id"
IS_IT_CALLED = (
    "is this the store that AGL_STORE names where the server runs, and is the server called? `agl doctor --url` asks it"
)
WAITING = ("queuing", "requeuing")
UNDER_WAY = ("preparing", "running")
SECONDS_TO_BEGIN = 60.0
"""The time that an attempt may be without a call before that is worth explaining."""


@dataclass(frozen=True, slots=True)
class Absence:
    """A reason and what to do about it, each without a full stop."""

    reason: str
    advice: str


def explain_absence(
    of_rollout: Mapping[Any, int],
    *,
    has_any: bool,
    has_unassigned_calls: bool,
    has_losses: bool,
    status: str | None,
    seconds: float | None = None,
) -> Absence | None:
    """Explain why no generation of a rollout has finished; None where one has.

    Args:
        of_rollout: the number of its generations by how they ended, `finished` among them.
        has_any: whether the store has any generation.
        has_unassigned_calls: whether some generation belongs to no rollout.
        has_losses: whether a sender reported that it lost a generation.
        status: the rollout's status in the queue; None where the queue does not have it.
        seconds: how long its latest attempt has been under way; None if unknown.
    """
    if of_rollout["finished"]:
        return None
    if any(of_rollout.values()):
        counts = ", ".join(f"{count} {how}" for how, count in of_rollout.items() if count)
        return Absence(
            f"none of its calls finished ({counts}): the client hung up, or the engine failed first",
            "look at the client's timeout, and at the server's log",
        )
    if status in WAITING:
        return Absence("it is waiting in the queue", "check that a runner is running, and that it asks this store")
    if status in UNDER_WAY and seconds is not None and seconds < SECONDS_TO_BEGIN:
        return Absence("it has just started", "wait for its first call to end")
    nothing = "no recorded call names this rollout"
    if has_losses:
        return Absence(f"{nothing}; some calls were lost, maybe its own", "look at which calls were lost, and when")
    if not has_any:
        return Absence(f"{nothing} or any other", IS_IT_CALLED)
    if has_unassigned_calls:
        return Absence(f"{nothing}; some calls name none: was it called without its id?", NAME_IT)
    return Absence(
        f"{nothing}; other rollouts have calls", "compare its id with the one in the agent's base URL or headers"
    )
