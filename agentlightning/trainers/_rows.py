"""Checks that every adapter makes before a trainer gets rows, each with a sentence that says what to do.

A trainer that gets a row without a reward, or of another model, trains it in silence. So nothing is filled in here, cut
or left out: the caller chooses rows with the options of `store.trajectories()`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from agentlightning.errors import UnusableRows
from agentlightning.trajectory import Trajectory

__all__ = [
    "check_models",
    "check_rows",
    "experts_of",
    "group_of_row",
    "have_logprobs",
    "logprobs_of",
    "masked",
    "name_of",
    "reward_of",
]


def check_rows(
    trajectories: Sequence[Trajectory],
    *,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    max_length: int | None = None,
) -> None:
    """Refuse rows that a trainer cannot take or would train wrongly.

    Args:
        max_prompt_length: most ids before the first sampled one.
        max_response_length: most ids from there on.
        max_length: most ids of a whole row.

    Raises:
        UnusableRows: there is no row, rows are of several models, or one has no reward or is too long.
    """
    if not trajectories:
        raise UnusableRows(
            "there is no row to train",
            "look at `left_out` and `store.completeness()` of the rollouts, or at the options that chose the rows",
        )
    check_models(trajectories)
    for row in trajectories:
        reward_of(row)
        _check_length(row, "prompt", row.prompt_length, max_prompt_length)
        _check_length(row, "response", len(row.token_ids) - row.prompt_length, max_response_length)
        _check_length(row, "whole", len(row.token_ids), max_length)


def experts_of(row: Trajectory) -> Any:
    """Return the routed experts of all ids of a row that were fed to the model, by id and layer; None without any.

    Raises:
        UnusableRows: an id in between has none, and its place can be taken by nothing.
    """
    experts = row.routed_experts
    if experts is None:
        return None
    count, layers, each = experts.shape
    # All experts of an id are known, or none.
    known = [expert >= 0 for expert in experts.ids[:: layers * each]]
    length = max((place for place in range(count) if known[place]), default=-1) + 1
    if missing := length - sum(known[:length]):
        raise UnusableRows(
            f"{name_of(row)} has no routed experts for {missing} ids in the middle",
            "leave it out, or let clients not set routed_experts_prompt_start",
        )
    found: Any = np.frombuffer(experts.ids, np.int16)
    return found[: length * layers * each].reshape(length, layers, each)


def check_models(trajectories: Iterable[Trajectory]) -> None:
    """Refuse rows of several models.

    Raises:
        UnusableRows: the message names the models.
    """
    models = sorted({row.model or "unknown" for row in trajectories})
    if len(models) > 1:
        raise UnusableRows(
            f"the rows are of several models ({', '.join(models)})",
            "train one at a time, with the option model of store.trajectories()",
        )


def have_logprobs(trajectories: Sequence[Trajectory]) -> bool:
    """Tell whether rows have logprobs: trainers take those of all rows, or none.

    Raises:
        UnusableRows: some rows have logprobs and others do not, or one is infinite or not a number.
    """
    without = [row for row in trajectories if row.logprobs is None]
    if without and len(without) < len(trajectories):
        raise UnusableRows(
            f"{name_of(without[0])} has no logprobs, but other rows have",
            "start every vLLM with AGL_LOGPROBS=on, or leave the row out",
        )
    for row in trajectories:
        if row.logprobs is not None:
            logprobs_of(row)
    return not without


def logprobs_of(row: Trajectory) -> array[float]:
    """Return the logprobs of a row.

    Raises:
        UnusableRows: it has none, or one is infinite or not a number.
    """
    if row.logprobs is None:
        raise UnusableRows(f"{name_of(row)} has no logprobs", "start vLLM with AGL_LOGPROBS=on")
    if not np.isfinite(np.frombuffer(row.logprobs, np.float32)).all():
        raise UnusableRows(f"{name_of(row)} has infinite logprobs", "leave the row out")
    return row.logprobs


def reward_of(row: Trajectory) -> float:
    """Return the final reward of the row's attempt.

    Raises:
        UnusableRows: it has none.
    """
    if row.reward is None:
        raise UnusableRows(
            f"{name_of(row)} has no reward",
            "reward the rollout before it ends (rollout.reward(1.0)), or leave out rows whose reward is None",
        )
    return row.reward


def group_of_row(row: Trajectory) -> str:
    """Return the group of a row.

    Raises:
        UnusableRows: it has none. As one task, rollouts of which nothing is known would be compared with one another.
    """
    if row.group is None:
        raise UnusableRows(
            f"{name_of(row)} belongs to no task, since its rollout has no input",
            "create the rollout with an input, or with a text `group` in its metadata",
        )
    return row.group


def masked(row: Trajectory) -> Trajectory:
    """Return a row of which nothing is trained, with its reward, or 0.0 if it has none."""
    return replace(
        row,
        response_mask=array("b", bytes(len(row.token_ids))),
        spans=[replace(answer, is_trained=False) for answer in row.spans],
        reward=0.0 if row.reward is None else row.reward,
    )


def name_of(row: Trajectory) -> str:
    """Name a row in a sentence."""
    return f"row {row.index} of rollout {row.rollout_id!r}"


def _check_length(
    row: Trajectory, part: Literal["prompt", "response", "whole"], length: int, limit: int | None
) -> None:
    if limit is not None and length > limit:
        option = "max_length" if part == "whole" else f"max_{part}_length"
        raise UnusableRows(
            f"the {part} of {name_of(row)} has {length} ids, more than the {limit} that the trainer takes",
            f"raise the trainer's limit, or read the rows with {option}={limit}, which "
            f"{'leaves such rows out' if part == 'prompt' else 'cuts such rows, and flags them'}",
        )
