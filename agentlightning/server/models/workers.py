"""Workers, as the LightningStore interface of Agent Lightning 0.3 has them. Moments are seconds since the epoch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from agentlightning.server.models.common import LEFT_OUT, Logic, Part, Query, Sent, example
from agentlightning.store.workers import WorkerStatus

__all__ = ["ChangeWorker", "QueryWorkers", "Worker"]


class ChangeWorker(Sent):
    """A worker's sign of life."""

    model_config = example(heartbeat_stats={"cpu_percent": 12.5})

    heartbeat_stats: dict[str, Any] = LEFT_OUT


class Worker(BaseModel):
    """A runner, and what was heard of it last."""

    worker_id: str
    status: WorkerStatus
    heartbeat_stats: dict[str, Any] | None
    last_heartbeat_time: float | None
    last_dequeue_time: float | None
    last_busy_time: float | None
    last_idle_time: float | None
    current_rollout_id: str | None
    current_attempt_id: str | None


class QueryWorkers(Query):
    """Which workers."""

    model_config = example(status_in=["busy"])

    status_in: list[WorkerStatus] | None = Field(None, max_length=64)
    worker_id_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal[
            "worker_id",
            "status",
            "heartbeat_stats",
            "last_heartbeat_time",
            "last_dequeue_time",
            "last_busy_time",
            "last_idle_time",
            "current_rollout_id",
            "current_attempt_id",
        ]
        | None
    ) = None
