"""Routes about the server itself: health, metrics, and counts."""

from __future__ import annotations

import logging
import time
from typing import Literal

from fastapi import Request, Response
from pydantic import BaseModel, Field

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.server.answers import Json
from agentlightning.server.errors import sentence
from agentlightning.server.middleware.metrics import CONTENT_TYPE_LATEST
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import drift_index, rollouts
from agentlightning.store import health as store_health

__all__ = ["interface", "root"]

logger = logging.getLogger("agentlightning.store")

root = router("about", prefix="")
interface = router("about")


class Statistics(BaseModel):
    """Number of records, and the server's uptime."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    total_workers: int
    total_generations: int
    uptime: float = Field(description="Seconds.")


class Health(BaseModel):
    """Health of the server."""

    status: Literal["ok"]


@root.get("/healthz", response_model=Health)
async def is_alive() -> Response:
    """Tell that the server answers."""
    return Json({"status": "ok"})


@root.get("/readyz", response_model=Health, responses={503: errors()[503]})
async def is_ready(database: Database) -> Response:
    """Tell whether the store can be read and written."""
    try:
        await database.write(store_health.check)
    except (StoreUnavailable, StoreRefused) as error:
        # A client without a key must not learn where the store is.
        logger.error("%s", error)
        return sentence(503, "the store cannot be used now: its log says why", {"Retry-After": "1"})
    return Json({"status": "ok"})


@root.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors()},
)
async def metrics(request: Request, database: Database) -> Response:
    """Export metrics for Prometheus."""
    await request.app.state.drift.look()
    by_status, totals = await database.read(
        lambda connection: (rollouts.count_by_status(connection), drift_index.totals(connection))
    )
    text = request.app.state.metrics.text(by_status, database.waiting, totals)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@interface.get("/health", response_model=Health, responses=errors())
async def health() -> Response:
    """Tell that the server answers, with the key that runners use."""
    return Json({"status": "ok"})


@interface.get("/statistics", response_model=Statistics, responses=errors())
async def statistics(request: Request, database: Database) -> Response:
    """Count the records."""
    counts = await database.read(store_health.count)
    return Json({"name": "agl store", **counts, "uptime": time.monotonic() - request.app.state.started_at})
