"""Trajectories for verl: agent loop outputs, and the fields of a `DataProto` as Agent Lightning 1.0 fills them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agentlightning.trainers._rows import check_rows, experts_of, group_of_row, have_logprobs, logprobs_of
from agentlightning.trainers.torch import collate
from agentlightning.trajectory import Trajectory

__all__ = ["agent_loop_outputs", "data_proto"]


def agent_loop_outputs(
    trajectories: Sequence[Trajectory], max_prompt_length: int | None = None, max_response_length: int | None = None
) -> list[Any]:
    """Return an `AgentLoopOutput` for each row, in order.

    Args:
        max_prompt_length: `prompt_length` of verl's rollout configuration, which fails on longer rows without naming
            them.
        max_response_length: its `response_length`.

    Raises:
        UnusableRows: see `check_rows` and `have_logprobs`.
    """
    from verl.experimental.agent_loop.agent_loop import (  # pyright: ignore[reportMissingImports]
        AgentLoopMetrics,
        AgentLoopOutput,
    )

    check_rows(trajectories, max_prompt_length=max_prompt_length, max_response_length=max_response_length)
    with_logprobs = have_logprobs(trajectories)
    found = []
    for row in trajectories:
        steps = [int(version) for version, _, _ in row.weight_versions or () if version.isdecimal()]
        output = AgentLoopOutput(
            prompt_ids=row.token_ids[: row.prompt_length].tolist(),
            response_ids=row.token_ids[row.prompt_length :].tolist(),
            response_mask=row.response_mask[row.prompt_length :].tolist(),
            response_logprobs=logprobs_of(row)[row.prompt_length :].tolist() if with_logprobs else None,
            routed_experts=experts_of(row),
            reward_score=row.reward,
            # An answer, and what stood before it.
            num_turns=2 * len(row.spans),
            metrics=AgentLoopMetrics(),
            extra_fields={
                "rollout_id": row.rollout_id,
                "attempt_id": row.attempt_id,
                "row": row.index,
                "group": row.group,
                "min_global_steps": min(steps, default=None),
                "max_global_steps": max(steps, default=None),
            },
        )
        found.append(output)
    return found


def data_proto(
    trajectories: Sequence[Trajectory], pad_id: int, max_prompt_length: int, max_response_length: int
) -> Any:
    """Return a `DataProto` with the fields that Agent Lightning 1.0's trainer reads.

    Each row has the reward of its rollout at its last id; `data_id_list` groups the rollouts of one task. In
    `is_drop_mask` are the rows of which nothing is trained: that trainer drops them when advantages are computed.

    Raises:
        UnusableRows: a row has no group; or see `check_rows` and `have_logprobs`.
    """
    from verl import DataProto  # pyright: ignore[reportAttributeAccessIssue]

    batch = collate(trajectories, pad_id, max_prompt_length, max_response_length)
    tensors = {name: batch[name] for name in ("prompts", "responses", "input_ids", "attention_mask", "position_ids")}
    tensors["response_mask"] = batch["response_mask"]
    tensors["token_level_scores"] = batch["rewards"]
    tensors["is_drop_mask"] = ~batch["response_mask"].any(1)
    if batch["logprobs"] is not None:
        tensors["rollout_log_probs"] = batch["logprobs"]
    texts = {
        "data_id_list": [group_of_row(row) for row in trajectories],
        "rollout_id_list": [row.rollout_id for row in trajectories],
        "turn_index_list": [row.index for row in trajectories],
    }
    return DataProto.from_dict(
        tensors=tensors, non_tensors={name: np.array(values, dtype=object) for name, values in texts.items()}
    )
