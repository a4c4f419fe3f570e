"""Trajectories for SkyRL: a `GeneratorOutput`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from agentlightning.errors import UnusableRows
from agentlightning.trainers._rows import check_rows, experts_of, group_of_row, have_logprobs, logprobs_of, name_of
from agentlightning.trajectory import Trajectory

__all__ = ["generator_output"]


def generator_output(
    trajectories: Sequence[Trajectory], *, step_wise: bool = False, max_length: int | None = None
) -> Any:
    """Return the `GeneratorOutput` of rows, those of an attempt next to each other.

    Processed logprobs come with the sampling masks, so that SkyRL computes its own logprobs among the same ids.

    Args:
        step_wise: take several rows of a rollout as its steps, with the reward at the last id of the last one. Without
            it, each rollout has exactly one row.
        max_length: most ids of a row: the trainer's `algorithm.max_seq_len`, above which SkyRL only warns.

    Raises:
        UnusableRows: a rollout has several rows and `step_wise` is off, its rows are not next to each other, or it has
            no group; a row lacks experts or sampling masks that others have; or see `check_rows` and `have_logprobs`.
    """
    from skyrl.train.generators.base import (  # pyright: ignore[reportMissingImports]
        GeneratorOutput,
        TrajectoryID,
    )

    check_rows(trajectories, max_length=max_length)
    steps = [list(rows) for _, rows in groupby(trajectories, key=lambda row: (row.rollout_id, row.attempt_id))]
    if len(steps) > len({(rows[0].rollout_id, rows[0].attempt_id) for rows in steps}):
        raise UnusableRows("the rows of a rollout are not next to each other", "sort them by rollout_id")
    several = next((rows for rows in steps if len(rows) > 1), None)
    if several is not None and not step_wise:
        raise UnusableRows(
            f"rollout {several[0].rollout_id!r} has {len(several)} rows, and SkyRL takes one a prompt",
            "pass step_wise=True here and in SkyRL's generator.step_wise_trajectories",
        )
    seen: Counter[str] = Counter()
    ids, rewards, is_last = [], [], []
    for rows in steps:
        instance = group_of_row(rows[0])
        ids += [TrajectoryID(instance_id=instance, repetition_id=seen[instance])] * len(rows)
        seen[instance] += 1
        for row in rows:
            is_last.append(row is rows[-1])
            of_row = [0.0] * (len(row.token_ids) - row.prompt_length)
            of_row[-1] = (row.reward or 0.0) if row is rows[-1] else 0.0
            rewards.append(of_row)
    return GeneratorOutput(
        prompt_token_ids=[row.token_ids[: row.prompt_length].tolist() for row in trajectories],
        response_ids=[row.token_ids[row.prompt_length :].tolist() for row in trajectories],
        rewards=rewards,
        loss_masks=[row.response_mask[row.prompt_length :].tolist() for row in trajectories],
        stop_reasons=[row.spans[-1].finish_reason or row.spans[-1].status for row in trajectories],
        rollout_metrics=None,
        rollout_logprobs=[logprobs_of(row)[row.prompt_length :].tolist() for row in trajectories]
        if have_logprobs(trajectories)
        else None,
        trajectory_ids=ids,
        trajectory_generation_times=None,
        trajectory_time_splits=None,
        rollout_expert_indices=_experts(trajectories),
        rollout_sample_support=_support(trajectories),
        is_last_step=is_last if step_wise else None,
        env_metrics=None,
        pixel_values=None,
        image_grid_thw=None,
    )


def _experts(trajectories: Sequence[Trajectory]) -> list[Any] | None:
    known = [found for row in trajectories if (found := experts_of(row)) is not None]
    if known and len(known) < len(trajectories):
        without = next(row for row in trajectories if row.routed_experts is None)
        raise UnusableRows(f"{name_of(without)} has no routed experts, but others have", "leave it out")
    return known or None


def _support(trajectories: Sequence[Trajectory]) -> list[Any] | None:
    """Return for each id of a response those that it was chosen from, and -1 behind them; None if nothing was cut off.

    An id without any was chosen from the whole vocabulary. So were those that raw logprobs are of.
    """
    masks = [row.sampling_mask if (row.logprobs_mode or "").startswith("processed") else None for row in trajectories]
    if not any(masks):
        return None
    without = next((row for row in trajectories if "no_mask" in row.flags), None)
    if without is not None:
        raise UnusableRows(f"{name_of(without)} has no sampling masks, but others have", "leave it out")
    width = max(int(np.diff(np.frombuffer(mask.offsets, np.uint32)).max()) for mask in masks if mask)
    found = []
    for row, mask in zip(trajectories, masks, strict=True):
        of_row = np.full((len(row.token_ids) - row.prompt_length, width), -1, np.int32)
        if mask:
            offsets = np.frombuffer(mask.offsets, np.uint32)[row.prompt_length :]
            # A row of the array takes as many as stand there.
            of_row[np.arange(width) < np.diff(offsets)[:, None]] = np.frombuffer(mask.ids, np.int32)[offsets[0] :]
        found.append(of_row)
    return found
