"""Rows for the tests of adapters: made by `merge`, as a store makes them."""

from __future__ import annotations

from array import array
from typing import Any

from agentlightning.generation import RoutedExperts, SamplingMask
from agentlightning.trajectory import AttemptCalls, Call, Trajectory, merge

__all__ = ["PAD", "call", "conversation", "forked", "with_experts", "with_masks"]

PAD = 0
LAYERS, EXPERTS = 2, 3


def call(generation_id: str, prompt: list[int], answer: list[int], **fields: Any) -> Call:
    """Make a call whose logprob of an id is a hundredth of it, below zero."""
    usual: dict[str, Any] = {
        "finished_at": int(generation_id),
        "finish_reason": "stop",
        "model": "m",
        "logprobs": array("f", [-each / 100 for each in answer]),
        "logprobs_mode": "raw_logprobs",
        "weight_versions": [("3", 0, len(answer))],
    }
    return Call(
        generation_id=generation_id,
        prompt_token_ids=array("i", prompt),
        response_token_ids=array("i", answer),
        **usual | fields,
    )


def conversation(rollout_id: str = "ro", reward: float | None = 1.0, **fields: Any) -> Trajectory:
    """Make the row of two calls: 1 2 3 [4 5] 6 [7 8 9]."""
    calls = [call("1", [1, 2, 3], [4, 5], **fields), call("2", [1, 2, 3, 4, 5, 6], [7, 8, 9], **fields)]
    [row] = _merged(calls, rollout_id, reward)
    return row


def forked(rollout_id: str = "ro", reward: float | None = 1.0) -> list[Trajectory]:
    """Make the two rows of a rollout whose second prompt has another answer than the first call gave."""
    return _merged([call("1", [1, 2], [4, 5]), call("2", [1, 2, 4, 6, 7], [8])], rollout_id, reward)


def with_experts() -> Trajectory:
    """Make a row with the experts of all ids but the last, which was never fed to the model."""
    row = conversation()
    count, width = len(row.token_ids), LAYERS * EXPERTS
    ids = array("h", [*range((count - 1) * width), *[-1] * width])
    row.routed_experts, row.missing_experts = RoutedExperts((count, LAYERS, EXPERTS), ids), 1
    return row


def with_masks(rollout_id: str) -> Trajectory:
    """Make a row whose ids were chosen from one, two or three."""
    left = {4: [4, 1, 2], 7: [7, 1], 9: [9, 2]}
    masks = [SamplingMask.of_lists([left.get(each, [each]) for each in answer]) for answer in ([4, 5], [7, 8, 9])]
    usual = {"logprobs_mode": "processed_logprobs", "sampling_params": '{"top_p": 0.9}'}
    calls = [
        call("1", [1, 2, 3], [4, 5], sampling_mask=masks[0], **usual),
        call("2", [1, 2, 3, 4, 5, 6], [7, 8, 9], sampling_mask=masks[1], **usual),
    ]
    [row] = _merged(calls, rollout_id, 1.0)
    return row


def _merged(calls: list[Call], rollout_id: str, reward: float | None) -> list[Trajectory]:
    attempt = AttemptCalls(calls=calls, rollout_id=rollout_id, attempt_id="at", reward=reward, input="a task")
    return merge(attempt).rows
