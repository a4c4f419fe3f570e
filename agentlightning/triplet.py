"""Triplets, which an algorithm learns from: the prompt's ids, the response's ids, and the reward."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from agentlightning.generation import (
    VERSION,
    RoutedExperts,
    SamplingMask,
    Status,
    named,
    unnamed,
    with_arrays,
    with_lists,
)

__all__ = ["Triplet"]


@dataclass(slots=True)
class Triplet:
    """A choice of a generation, its rollout, and its reward. An unknown field is None.

    Attributes:
        generation_id: the generation's `id`.
        response_id: the `id` of the answer that the client saw.
        rollout_id: the rollout that the call belongs to.
        attempt_id: the attempt that a span of the rollout, or else the call, names.
        agent_id, parent_agent_id, purpose, retry: as in a `Generation`.
        index: position of the choice in the generation.
        status: status of the generation: `finished`, `aborted` or `error`.
        finish_reason: vLLM's word for why the answer ended: `stop`, `length`, `abort`, ...
        model: the name that the client asked for.
        prompt_token_ids, response_token_ids: the ids that went into the model, and those that it sampled; `array('i')`.
        logprobs: one for each of `response_token_ids`; `array('f')`.
        reward: the call's reward, by the rules of `agentlightning.store.triplets.of_rollout`.
        span_id: the first span of the rollout that names the answer.
        weight_versions: `(version, start, end)`, as in a `Choice`.
        routed_experts: those of each id of prompt and response, by its position; -1 where vLLM gave none.
        sampling_mask: as in a `Choice`.
        input, metadata: those of the rollout; None if it was only recorded.
    """

    generation_id: str
    response_id: str | None
    rollout_id: str | None
    attempt_id: str | None
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    index: int
    status: Status
    finish_reason: str | None
    model: str | None
    prompt_token_ids: array[int] | None
    response_token_ids: array[int] | None
    logprobs: array[float] | None
    reward: float | None
    span_id: str | None
    weight_versions: list[tuple[str, int, int]] | None
    routed_experts: RoutedExperts | None = None
    sampling_mask: SamplingMask | None = None
    input: Any = None
    metadata: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with lists in the place of arrays, and each weight version as a dictionary."""
        found = with_lists(self)
        if self.weight_versions is not None:
            found["weight_versions"] = named(VERSION, self.weight_versions)
        return found

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Triplet:
        """Restore a triplet from the JSON object of `as_dict`, in which a logprob of null is negative infinity.

        Raises:
            KeyError, TypeError, ValueError: the object is not a triplet.
        """
        values = with_arrays(cls, found)
        if values["weight_versions"] is not None:
            values["weight_versions"] = unnamed(VERSION, values["weight_versions"])
        return cls(**values)
