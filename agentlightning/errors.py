"""One tree of errors: every exception that a caller of this package is meant to catch.

```text
AgentLightningError
├── TrainingError
│   ├── UnusableRows        a trainer cannot take these rows, or would train them wrongly
│   ├── LogprobsDiffer      engine and trainer give other logprobs to the same ids
│   └── WeightsRefused      vLLM did not take the trainer's weights
└── StoreError
    ├── StoreUnavailable    the store cannot be reached or written now; retrying may help
    ├── StoreRefused        the store cannot be used as configured; waiting does not help
    ├── InvalidRecord       a record cannot be stored; the others of the same call are
    ├── NotFound            no rollout, attempt or resources of that id
    ├── RolloutTooLarge     a rollout has more calls or ids than are read at once
    └── RolloutUnderWay     a rollout that has not ended cannot be deleted
```

Each message is one sentence that says what happened and, where there is something to do about it, what.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

__all__ = [
    "AgentLightningError",
    "InvalidRecord",
    "LogprobsDiffer",
    "NotFound",
    "RolloutTooLarge",
    "RolloutUnderWay",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
    "TrainingError",
    "UnusableRows",
    "WeightsRefused",
]

REASONS_SHOWN = 3


class AgentLightningError(Exception):
    """Base of all errors of this package. Its text is what happened and, after a colon, the advice.

    Attributes:
        happened: what happened, without the advice.
        advice: what to do about it; None where nothing helps but what the message says already.
    """

    def __init__(self, happened: str, advice: str | None = None) -> None:
        super().__init__(f"{happened}: {advice}" if advice else happened)
        self.happened = happened
        self.advice = advice


class TrainingError(AgentLightningError):
    """Base of what `agentlightning.trainers` refuses."""


class UnusableRows(TrainingError):
    """A trainer cannot take these rows, or would train them wrongly."""


class LogprobsDiffer(TrainingError):
    """Engine and trainer give other logprobs to the same ids."""


class WeightsRefused(TrainingError):
    """vLLM did not take the trainer's weights."""


class StoreError(AgentLightningError):
    """Base of all errors of a store."""


class StoreUnavailable(StoreError):
    """The store cannot be reached or written now; retrying may help.

    Attributes:
        retry_after: seconds to wait before the next attempt, as the store asks for; None where it does not say.
    """

    def __init__(self, happened: str, advice: str | None = None, *, retry_after: float | None = None) -> None:
        super().__init__(happened, advice)
        self.retry_after = retry_after


class StoreRefused(StoreError):
    """The store cannot be used as configured, and waiting does not help."""


class InvalidRecord(StoreError):
    """A record cannot be stored; all others of the same call are stored.

    Attributes:
        reasons: one sentence each, by the id of the record that is not stored; empty where there was just one record.
        new: how many of the others are new.
    """

    def __init__(self, reasons: Mapping[str, str] | str, new: int = 0) -> None:
        if isinstance(reasons, str):
            super().__init__(reasons)
            reasons = {}
        else:
            shown = [f"{record_id[:100]}: {reason}" for record_id, reason in islice(reasons.items(), REASONS_SHOWN)]
            if len(reasons) > REASONS_SHOWN:
                shown.append(f"and {len(reasons) - REASONS_SHOWN} more")
            super().__init__("; ".join(shown))
        self.reasons = reasons
        self.new = new


class NotFound(StoreError):
    """No rollout, attempt or resources of that id."""


class RolloutTooLarge(StoreError):
    """A rollout has more calls or ids than are read at once, for its triplets, trajectories or drift."""


class RolloutUnderWay(StoreError):
    """A rollout that has not ended cannot be deleted; none of the same call is.

    Args:
        states: the states of such rollouts, by their ids; or the message.
    """

    def __init__(self, states: Mapping[str, str] | str) -> None:
        if not isinstance(states, str):
            shown = [f"{rollout_id[:100]!r} is {state}" for rollout_id, state in islice(states.items(), REASONS_SHOWN)]
            if len(states) > REASONS_SHOWN:
                shown.append(f"and {len(states) - REASONS_SHOWN} more")
            advice = "wait until it has ended, or set its status to cancelled"
            states = f"a rollout that is under way cannot be deleted: {', '.join(shown)}; {advice}"
        super().__init__(states)
