"""The server itself: whether it works, and how much there is."""

from __future__ import annotations

import logging
import time

from fastapi import Request, Response
from sqlalchemy import Connection, Table, func, literal, select

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.server.answers import Json
from agentlightning.server.errors import sentence
from agentlightning.server.middleware.metrics import CONTENT_TYPE_LATEST
from agentlightning.server.models import about as models
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import rollouts, tables
from agentlightning.store.probes import read_afresh, write_something

__all__ = ["interface", "root"]

COUNTED = {
    "total_rollouts": tables.rollouts,
    "total_attempts": tables.attempts,
    "total_spans": tables.spans,
    "total_resources": tables.resources,
    "total_workers": tables.workers,
    "total_generations": tables.generations,
}

logger = logging.getLogger("agentlightning.store")

root = router("about", prefix="")
interface = router("about")


@root.get("/healthz", response_model=models.Health)
async def is_alive() -> Response:
    """That the server answers; without a key."""
    return Json({"status": "ok"})


@root.get("/readyz", response_model=models.Health, responses={503: errors()[503]})
async def is_ready(database: Database) -> Response:
    """That its store can be read and written; without a key."""

    def work(connection: Connection) -> None:
        read_afresh(connection)
        for table in COUNTED.values():
            connection.execute(select(literal(1)).select_from(table).limit(1)).first()
        # A file that is gone or a full disk can be read, and so can a database that only reads.
        write_something(connection)

    try:
        await database.write(work)
    except (StoreUnavailable, StoreRefused) as error:
        # Whoever asks has no key, and is not told where the store is.
        logger.error("%s", error)
        return sentence(503, "the store cannot be used now: its log says why", {"Retry-After": "1"})
    return Json({"status": "ok"})


@root.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors()},
)
async def metrics(request: Request, database: Database) -> Response:
    """What Prometheus reads."""
    by_status = await database.read(rollouts.count_by_status)
    text = request.app.state.metrics.text(by_status, database.waiting)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@interface.get("/health", response_model=models.Health, responses=errors())
async def health() -> Response:
    """That the server answers, as runners ask."""
    return Json({"status": "ok"})


@interface.get("/statistics", response_model=models.Statistics, responses=errors())
async def statistics(request: Request, database: Database) -> Response:
    """How much there is."""

    def count(connection: Connection) -> dict[str, int]:
        return {name: _size(connection, table) for name, table in COUNTED.items()}

    counts = await database.read(count)
    return Json({"name": "agl store", **counts, "uptime": time.monotonic() - request.app.state.started_at})


def _size(connection: Connection, table: Table) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar_one()
