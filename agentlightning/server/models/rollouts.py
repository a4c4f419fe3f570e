"""Rollouts and their attempts, as the LightningStore interface of Agent Lightning 0.3 has them. Moments are seconds
since the epoch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from agentlightning.server.limits import BATCH_LIMIT, DEQUEUE_LIMIT
from agentlightning.server.models.common import LEFT_OUT, Id, Logic, Part, Query, Seconds, Sent, Whole, example
from agentlightning.store.rollouts import AttemptStatus, Config, Mode, RolloutStatus

__all__ = [
    "Attempt",
    "AttemptedRollout",
    "ChangeAttempt",
    "ChangeRollout",
    "Dequeue",
    "Enqueue",
    "NewRollout",
    "QueryAttempts",
    "QueryRollouts",
    "Rollout",
    "StartAttempt",
    "StartRollout",
    "WaitForRollouts",
]


# Clients of 0.3 clear an id by an empty one, and find it again like that: such a `Part` may be.


class RolloutConfig(Sent):
    """When an attempt is given up, and when another is made."""

    model_config = example(
        timeout_seconds=600.0, unresponsive_seconds=60.0, max_attempts=3, retry_condition=["timeout"]
    )

    timeout_seconds: Seconds | None = Field(None, description="How long an attempt may take; null is for ever.")
    unresponsive_seconds: Seconds | None = Field(None, description="How long an attempt may be without a sign of life.")
    max_attempts: Whole = Field(
        1, ge=1, le=2**31 - 1, description="How many attempts there may be, the first included."
    )
    retry_condition: list[AttemptStatus] = Field([], max_length=64, description="Ends that are tried again after.")

    def as_config(self) -> Config:
        return Config(**self.model_dump())


class NewRollout(Sent):
    """A rollout that is to be made."""

    model_config = example(input={"question": "What is 6 x 7?"}, mode="train", metadata={"split": 1})

    input: Any = Field(description="The task: any JSON.")
    mode: Mode | None = None
    resources_id: Part | None = Field(None, description="Null is the latest resources.")
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None


class StartRollout(NewRollout):
    """A rollout that is run at once, by the worker that asks."""

    worker_id: Part | None = None


class Enqueue(Sent):
    """Rollouts for the queue, in this order."""

    model_config = example(rollouts=[{"input": {"question": "What is 6 x 7?"}, "mode": "train"}])

    rollouts: list[NewRollout] = Field(max_length=BATCH_LIMIT)


class Dequeue(Sent):
    """How many rollouts a worker takes."""

    model_config = example(limit=1, worker_id="runner-1")

    limit: Whole = Field(1, description=f"At most {DEQUEUE_LIMIT} are taken at once, however many are asked for.")
    worker_id: Part | None = None


class ChangeRollout(Sent):
    """What is to be set of a rollout; what is not there stays."""

    model_config = example(status="cancelled")

    input: Any = LEFT_OUT
    mode: Mode | None = None
    resources_id: Part | None = None
    status: RolloutStatus = LEFT_OUT
    config: RolloutConfig = LEFT_OUT
    metadata: dict[str, Any] | None = None


class StartAttempt(Sent):
    """Who makes the attempt."""

    model_config = example(worker_id="runner-1")

    worker_id: Part | None = None


class ChangeAttempt(Sent):
    """What is to be set of an attempt; what is not there stays."""

    model_config = example(status="succeeded")

    status: AttemptStatus = LEFT_OUT
    worker_id: Part = LEFT_OUT
    last_heartbeat_time: Seconds = LEFT_OUT
    metadata: dict[str, Any] = LEFT_OUT


class WaitForRollouts(Sent):
    """Rollouts that somebody waits for."""

    model_config = example(rollout_ids=["ro-1"], timeout=5.0)

    rollout_ids: list[Id] = Field(max_length=BATCH_LIMIT)
    timeout: float | None = Field(None, description="Seconds; null is until all have ended.")


class Attempt(BaseModel):
    """One try at a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int = Field(description="1 for the first.")
    start_time: float
    end_time: float | None
    status: AttemptStatus
    worker_id: str | None
    last_heartbeat_time: float | None
    metadata: dict[str, Any] | None


class Rollout(BaseModel):
    """A task and what has become of it."""

    rollout_id: str
    input: Any
    start_time: float
    end_time: float | None
    mode: Mode | None
    resources_id: str | None
    status: RolloutStatus
    config: RolloutConfig
    metadata: dict[str, Any] | None


class AttemptedRollout(Rollout):
    """A rollout with its latest attempt."""

    attempt: Attempt


class QueryRollouts(Query):
    """Which rollouts."""

    model_config = example(status_in=["queuing", "running"], limit=100)

    status_in: list[RolloutStatus] | None = Field(None, max_length=64)
    rollout_id_in: list[Part] | None = Field(None, max_length=BATCH_LIMIT)
    rollout_id_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal["rollout_id", "input", "start_time", "end_time", "mode", "resources_id", "status", "config", "metadata"]
        | None
    ) = None


class QueryAttempts(Query):
    """Which attempts of a rollout."""

    model_config = example(sort_by="start_time", sort_order="desc")

    sort_by: (
        Literal[
            "attempt_id",
            "sequence_id",
            "start_time",
            "end_time",
            "status",
            "worker_id",
            "last_heartbeat_time",
            "metadata",
        ]
        | None
    ) = "sequence_id"
