"""Routes of workers, as the LightningStore of Agent Lightning 0.3 has them. Times are seconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Body, Query, Response
from pydantic import BaseModel, Field

from agentlightning.rollout_records import WorkerStatus
from agentlightning.server import schemas
from agentlightning.server.answers import Json, document, listed
from agentlightning.server.decoding import without_nan
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import LEFT_OUT, Id, Logic, Page, Part, Sent, example
from agentlightning.store import workers

__all__ = ["routes"]

routes = router("workers", mend=without_nan)


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


class QueryWorkers(schemas.Query):
    """Filters, order and page of workers."""

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


@routes.get("/workers", response_model=Page[Worker], responses=errors())
async def query_workers(wanted: Annotated[QueryWorkers, Query()], database: Database) -> Response:
    """Find workers."""
    return await _listed(wanted, database)


@routes.post("/workers/search", response_model=Page[Worker], responses=errors())
async def search_workers(wanted: QueryWorkers, database: Database) -> Response:
    """Find workers."""
    return await _listed(wanted, database)


@routes.get("/workers/{worker_id}", response_model=Worker | None, responses=errors())
async def get_worker(worker_id: Id, database: Database) -> Response:
    """Find a worker; null where this store never heard of it."""
    row = await database.read(lambda connection: workers.find(connection, worker_id))
    return Json(None if row is None else _fields(row))


@routes.post("/workers/{worker_id}", response_model=Worker, responses=errors())
async def update_worker(
    worker_id: Id, database: Database, body: Annotated[ChangeWorker | None, Body()] = None
) -> Response:
    """Record a sign of life of a worker, with what it reports."""
    stats = None if body is None else body.heartbeat_stats
    return Json(_fields(await database.write(lambda connection: workers.heartbeat(connection, worker_id, stats))))


def _fields(row: Any) -> dict[str, Any]:
    return workers.worker_fields(row, document)


async def _listed(wanted: QueryWorkers, database: Database) -> Response:
    found = workers.listing(wanted.status_in, wanted.worker_id_contains, wanted.filter_logic)
    return await listed(database, found, wanted, _fields)
