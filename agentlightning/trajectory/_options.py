"""Options of merging: what becomes of a prompt that breaks its context, and which rows are kept."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

from agentlightning.generation import Status
from agentlightning.trajectory._calls import as_integer

__all__ = ["DRIFTS", "DRIFT_LIMIT", "Drift", "MergeOptions", "check_options"]

Drift = Literal["fork", "realign", "trajectory", "transition"]
"""Treatment of a prompt that breaks the context that it should extend; see `MergeOptions`."""
DRIFTS: tuple[Drift, ...] = get_args(Drift)
DRIFT_LIMIT = 8


class MergeOptions(TypedDict, total=False):
    """Options: how calls become rows, and which rows are kept. Filters choose rows before it is decided which row
    trains an answer that several share, so that no answer is lost with a row that is left out.

    Attributes:
        drift: what becomes of a prompt that breaks the context that it should extend. `fork`, the default, or
            `trajectory`: it begins a row of its own. `realign`: where only the end of the last answer differs, the row
            goes on, with that end overwritten from the prompt, and masked. `transition`: each call is a row.
        drift_limit: most ids that `realign` overwrites; 8 by default.
        status: rows whose calls all have this status.
        model: rows of this model.
        agent_id: rows of this agent; None for rows whose calls all name none.
        parent_agent_id, purpose, retry: rows whose calls all say this of their callers; None where they say nothing.
        min_reward: rows whose reward is at least this.
        weight_version: rows of which every sampled id is known to be of this version.
        max_staleness: with `weight_version`, which must be an integer: versions up to so many smaller count, too.
        complete: rows without the flags `aborted`, `truncated`, `cut` and `missing_call`.
        max_length: most ids of a row; what is behind is cut off.
        max_prompt_length: rows with a longer prompt are left out, since nothing of them was sampled in less context.
        max_response_length: most ids from `prompt_length` on; what is behind is cut off.
    """

    drift: Drift
    drift_limit: int
    status: Status
    model: str
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    min_reward: float
    weight_version: str
    max_staleness: int
    complete: bool
    max_length: int
    max_prompt_length: int
    max_response_length: int


def check_options(options: MergeOptions) -> None:
    """Check the values of options.

    Raises:
        ValueError: one makes no sense; the message is a sentence.
    """
    drift: Any = options.get("drift", "fork")
    if drift not in DRIFTS:
        raise ValueError(f"drift: {drift!r} is not one of {', '.join(DRIFTS)}")
    for name in ("drift_limit", "max_length", "max_prompt_length", "max_response_length", "max_staleness"):
        if (value := options.get(name)) is not None and value < 0:
            raise ValueError(f"{name}: must not be negative, as {value} is")
    if options.get("max_staleness") is not None:
        version = options.get("weight_version")
        if version is None or as_integer(version) is None:
            raise ValueError("max_staleness: needs a weight_version that is an integer, to count from")
