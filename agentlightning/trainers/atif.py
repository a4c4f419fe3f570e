"""Trajectories in the Agent Trajectory Interchange Format, as JSON objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agentlightning.trainers._rows import logprobs_of
from agentlightning.trajectory import Answer, Trajectory

__all__ = ["SCHEMA_VERSION", "documents"]

SCHEMA_VERSION = "ATIF-v1.8"


def documents(
    trajectories: Sequence[Trajectory],
    decode: Callable[[list[int]], str],
    agent_name: str = "agent",
    agent_version: str = "unknown",
) -> list[dict[str, Any]]:
    """Return an ATIF document for each row, in order: each answer is a step, and so is what stood before it.

    Steps have the exact ids and logprobs; an answer that is trained in another row is copied context.

    Args:
        decode: the tokenizer's, which makes the text of a step from its ids. Rows have ids alone.

    Raises:
        UnusableRows: a logprob is infinite or not a number, which JSON cannot hold.
    """
    return [
        {
            "schema_version": SCHEMA_VERSION,
            "session_id": row.rollout_id,
            "trajectory_id": f"{row.attempt_id or row.rollout_id}-{row.index}",
            "agent": {"name": agent_name, "version": agent_version, "model_name": row.model},
            "steps": _steps(row, decode),
            "final_metrics": {"total_steps": 2 * len(row.spans)},
            "extra": {
                "reward": row.reward,
                "flags": row.flags,
                "group": row.group,
                "weight_versions": row.weight_versions,
                "input": row.input,
                "metadata": row.metadata,
            },
        }
        for row in trajectories
    ]


def _steps(row: Trajectory, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    end = 0
    for answer in row.spans:
        before = row.token_ids[end : answer.start].tolist()
        end = answer.end
        found.append({"step_id": len(found) + 1, "source": "user", "message": decode(before)})
        found.append(_answer(row, answer, len(found) + 1, decode))
    return found


def _answer(row: Trajectory, answer: Answer, step_id: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    ids = row.token_ids[answer.start : answer.end].tolist()
    metrics: dict[str, Any] = {
        "prompt_tokens": answer.start,
        "completion_tokens": len(ids),
        "prompt_token_ids": row.token_ids[: answer.start].tolist(),
        "completion_token_ids": ids,
        "extra": {"finish_reason": answer.finish_reason, "reward": answer.reward, "status": answer.status},
    }
    if row.logprobs is not None and answer.is_trained:
        metrics["logprobs"] = logprobs_of(row)[answer.start : answer.end].tolist()
    return {
        "step_id": step_id,
        "source": "agent",
        "message": decode(ids),
        "metrics": metrics,
        "is_copied_context": not answer.is_trained,
    }
