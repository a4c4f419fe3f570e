"""Trajectories for Tinker: a `Datum` each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from agentlightning.trainers._rows import check_rows, group_of_row, logprobs_of, reward_of
from agentlightning.trajectory import Trajectory

__all__ = ["datums"]


def datums(
    trajectories: Sequence[Trajectory],
    advantages: Iterable[float] | None = None,
    *,
    with_mask: bool = False,
    max_length: int | None = None,
) -> list[Any]:
    """Return a `Datum` for each row, in order, for the loss functions `importance_sampling` and `ppo`.

    Where the mask is 0 the advantage is 0.0, so nothing is trained there.

    Args:
        advantages: of each row; None for its reward without the mean of the rollouts of its `group`.
        with_mask: add `mask`, which tinker-cookbook reads for its metrics and removes before it trains.
        max_length: most ids of a row: those of the model's context.

    Raises:
        UnusableRows: a row has no logprobs, or infinite ones, or without `advantages` no group; or see `check_rows`.
    """
    from tinker import types  # pyright: ignore[reportAttributeAccessIssue]

    check_rows(trajectories, max_length=max_length)
    found = []
    if advantages is None:
        advantages = _advantages(trajectories)
    for row, advantage in zip(trajectories, advantages, strict=True):
        mask = np.frombuffer(row.response_mask, np.int8)[1:].astype(np.float32)
        values = {
            "target_tokens": np.frombuffer(row.token_ids, np.int32)[1:].astype(np.int64),
            "logprobs": np.frombuffer(logprobs_of(row), np.float32)[1:],
            "advantages": mask * np.float32(advantage),
        }
        if with_mask:
            values["mask"] = mask
        found.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(row.token_ids[:-1].tolist()),
                loss_fn_inputs={name: types.TensorData.from_numpy(each) for name, each in values.items()},
            )
        )
    return found


def _advantages(trajectories: Sequence[Trajectory]) -> list[float]:
    # Each rollout counts once, however many rows it has.
    rewards: dict[str, dict[Any, float]] = defaultdict(dict)
    for row in trajectories:
        rewards[group_of_row(row)][row.rollout_id, row.attempt_id] = reward_of(row)
    means = {group: sum(each.values()) / len(each) for group, each in rewards.items()}
    return [reward_of(row) - means[group_of_row(row)] for row in trajectories]
