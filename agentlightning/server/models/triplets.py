"""Triplets, and the rewards in them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from agentlightning.generation import Status
from agentlightning.server.models.common import Id, Sent, example

__all__ = ["QueryTriplets", "Reward", "Triplets"]


class Reward(Sent):
    """What an attempt, or a call of it, was worth."""

    model_config = example(value=1.0)

    value: float = Field(allow_inf_nan=False)
    generation_id: Id | None = Field(
        None, description="Which call it belongs to; null is the last of the attempt, whichever that is when asked for."
    )


class QueryTriplets(BaseModel):
    """Which triplets: all where nothing is said."""

    # A filter that there is not would let everything through.
    model_config = ConfigDict(extra="forbid")

    rollout_id: Id | None = None
    attempt_id: Id | None = None


class WeightVersion(BaseModel):
    """The weights that some ids were sampled with."""

    version: str
    start: int = Field(description="The place of the first of them in `response_token_ids`.")
    end: int = Field(description="The place after the last.")


class Triplet(BaseModel):
    """A choice of a model call of a rollout: what went in, what came out, and the reward."""

    generation_id: str
    response_id: str | None = Field(description="The `id` of the answer that the client saw.")
    rollout_id: str
    attempt_id: str | None
    index: int = Field(description="The choice's place among those of the generation.")
    status: Status
    model: str | None
    prompt_token_ids: list[int] | None
    response_token_ids: list[int] | None
    logprobs: list[float | None] | None = Field(description="Of each of the response's ids; null is minus infinity.")
    reward: float | None
    span_id: str | None = Field(description="The first span of the rollout that names the answer.")
    weight_versions: list[WeightVersion] | None


class Triplets(BaseModel):
    """Those of a rollout, in order."""

    items: list[Triplet]
