"""Why nothing is recorded of a rollout: `agl doctor` and the page say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["IS_IT_CALLED", "NAME_IT", "Absence", "why"]

NAME_IT = "call http://HOST:PORT/rollout/ROLLOUT/v1, or send the header x-agl-rollout-id"
IS_IT_CALLED = (
    "is this the store that AGL_STORE names where the server runs, and is the server called? `agl doctor --url` asks it"
)
WAITING = ("queuing", "requeuing")


@dataclass(frozen=True, slots=True)
class Absence:
    """What is known, and what may be done about it; each without a full stop."""

    reason: str
    advice: str


def why(
    of_rollout: Mapping[Any, int], *, has_any: bool, has_nobodys: bool, has_losses: bool, status: str | None
) -> Absence | None:
    """Why no generation of a rollout has finished; None where one has.

    Args:
        of_rollout: how many generations it has, by how they ended; `finished` is among them.
        has_any: whether there is any in the store.
        has_nobodys: whether one of these belongs to no rollout.
        has_losses: whether one could not be kept.
        status: of the rollout in the queue; None where that does not have it.
    """
    if of_rollout["finished"]:
        return None
    if any(of_rollout.values()):
        counts = ", ".join(f"{count} {how}" for how, count in of_rollout.items() if count)
        return Absence(
            f"{sum(of_rollout.values())}: {counts}: its clients hung up, or the engine failed, before an answer was "
            "through",
            "look at the client's timeout, and at the server's log",
        )
    if status in WAITING:
        return Absence("it waits in the queue", "is a runner at work, and does it ask this store?")
    nothing = "nothing is recorded for it"
    if has_losses:
        return Absence(f"{nothing}; what was lost may be its", "look at what was lost, and when")
    if not has_any:
        return Absence(f"{nothing}, nor for any other", IS_IT_CALLED)
    if has_nobodys:
        return Absence(f"{nothing}; was it called without naming it? Some calls named no rollout", NAME_IT)
    return Absence(
        f"{nothing}: the server was never called for it, only for others",
        "compare its id with the one in the agent's base URL or headers",
    )
