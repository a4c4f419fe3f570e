"""Resources: which models and prompts runners work with."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Response
from sqlalchemy import Connection, select

from agentlightning.server.answers import Json, encode, page, resources
from agentlightning.server.decoding import without_nan
from agentlightning.server.models import resources as models
from agentlightning.server.models.common import Id, Page
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import resources as kept
from agentlightning.store.pages import contains, matching
from agentlightning.store.tables import resources as table

__all__ = ["routes"]

routes = router("resources", mend=without_nan)


@routes.get("/resources", response_model=Page[models.ResourcesUpdate], responses=errors())
async def query_resources(asked: Annotated[models.QueryResources, Query()], database: Database) -> Response:
    """Find resources."""
    conditions = []
    if asked.resources_id is not None:
        conditions.append(table.c.resources_id == asked.resources_id)
    if asked.resources_id_contains is not None:
        conditions.append(contains(table.c.resources_id, asked.resources_id_contains))
    where = matching(conditions, "and")
    return await page(database, asked, lambda _: where, select(table), table.c.key, resources)


@routes.post("/resources", status_code=201, response_model=models.ResourcesUpdate, responses=errors())
async def add_resources(body: models.NamedResources, database: Database) -> Response:
    """Keep resources, which are the latest now."""
    content = _text(body)

    def work(connection: Connection) -> Any:
        return _find(connection, kept.add(connection, content))

    return Json(resources(await database.write(work)), 201)


@routes.get("/resources/latest", response_model=models.ResourcesUpdate | None, responses=errors())
async def get_latest_resources(database: Database) -> Response:
    """The resources that were added or changed last; null where there are none."""
    row = await database.read(lambda connection: _find(connection, kept.latest_id(connection)))
    return Json(None if row is None else resources(row))


@routes.get("/resources/{resources_id}", response_model=models.ResourcesUpdate | None, responses=errors())
async def get_resources(resources_id: Id, database: Database) -> Response:
    """Resources; null where there are none of this id."""
    row = await database.read(lambda connection: _find(connection, resources_id))
    return Json(None if row is None else resources(row))


@routes.post("/resources/{resources_id}", response_model=models.ResourcesUpdate, responses=errors())
async def update_resources(resources_id: Id, body: models.NamedResources, database: Database) -> Response:
    """Replace resources, or keep them under an id of one's own; they are the latest now."""
    content = _text(body)

    def work(connection: Connection) -> Any:
        kept.put(connection, resources_id, content)
        return _find(connection, resources_id)

    return Json(resources(await database.write(work)))


def _text(body: models.NamedResources) -> str:
    return encode({name: each.model_dump() for name, each in body.items()}).decode()


def _find(connection: Connection, resources_id: str | None) -> Any:
    return connection.execute(select(table).where(table.c.resources_id == resources_id)).first()
