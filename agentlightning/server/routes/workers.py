"""Workers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, Query, Response
from sqlalchemy import Connection, select

from agentlightning.server.answers import Json, encode, page, worker
from agentlightning.server.decoding import without_nan
from agentlightning.server.models import workers as models
from agentlightning.server.models.common import Id, Page
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import workers
from agentlightning.store.database import now
from agentlightning.store.pages import contains, matching
from agentlightning.store.tables import workers as table

__all__ = ["routes"]

routes = router("workers", mend=without_nan)


@routes.get("/workers", response_model=Page[models.Worker], responses=errors())
async def query_workers(asked: Annotated[models.QueryWorkers, Query()], database: Database) -> Response:
    """Find workers."""
    return await _page(asked, database)


@routes.post("/workers/search", response_model=Page[models.Worker], responses=errors())
async def search_workers(asked: models.QueryWorkers, database: Database) -> Response:
    """Find workers."""
    return await _page(asked, database)


@routes.get("/workers/{worker_id}", response_model=models.Worker | None, responses=errors())
async def get_worker(worker_id: Id, database: Database) -> Response:
    """A worker; null where nothing was heard of one of this id."""
    row = await database.read(lambda connection: _find(connection, worker_id))
    return Json(None if row is None else worker(row))


@routes.post("/workers/{worker_id}", response_model=models.Worker, responses=errors())
async def update_worker(
    worker_id: Id, database: Database, body: Annotated[models.ChangeWorker | None, Body()] = None
) -> Response:
    """Note a worker's sign of life, with what it says of itself."""
    changes: dict[str, Any] = {}
    if body is not None and body.heartbeat_stats is not None:
        changes["heartbeat_stats"] = encode(body.heartbeat_stats).decode()

    def work(connection: Connection) -> Any:
        workers.note(connection, worker_id, last_heartbeat_time=now(connection), **changes)
        return _find(connection, worker_id)

    return Json(worker(await database.write(work)))


def _find(connection: Connection, worker_id: str) -> Any:
    return connection.execute(select(table).where(table.c.worker_id == worker_id)).first()


async def _page(asked: models.QueryWorkers, database: Database) -> Response:
    conditions = []
    if asked.status_in is not None:
        conditions.append(table.c.status.in_(asked.status_in))
    if asked.worker_id_contains is not None:
        conditions.append(contains(table.c.worker_id, asked.worker_id_contains))
    where = matching(conditions, asked.filter_logic)
    return await page(database, asked, lambda _: where, select(table), table.c.key, worker)
