"""Routes of resources, as the LightningStore interface of Agent Lightning 0.3 has them.

Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from agentlightning.server import schemas
from agentlightning.server.answers import Json, document, listed
from agentlightning.server.decoding import without_nan
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import Id, Page, Part, Sent
from agentlightning.store import resources

__all__ = ["routes"]

routes = router("resources", mend=without_nan)


class Llm(Sent):
    """A model that is served."""

    model_config = ConfigDict(extra="allow")

    resource_type: Literal["llm", "proxy_llm"]
    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field({})


class PromptTemplate(Sent):
    """A prompt with gaps."""

    model_config = ConfigDict(extra="allow")

    resource_type: Literal["prompt_template"]
    template: str
    engine: Literal["jinja", "f-string", "poml"]


NamedResources = Annotated[
    dict[str, Annotated[Llm | PromptTemplate, Field(discriminator="resource_type")]],
    Field(
        examples=[
            {
                "main": {"resource_type": "llm", "endpoint": "http://127.0.0.1:8000/v1", "model": "Qwen/Qwen3-0.6B"},
                "prompt": {"resource_type": "prompt_template", "template": "{question}", "engine": "f-string"},
            }
        ]
    ),
]


class ResourcesUpdate(BaseModel):
    """Resources, and which version of them it is."""

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: NamedResources


class QueryResources(schemas.Query):
    """Filters, order and page of resources."""

    resources_id: Part | None = None
    resources_id_contains: Part | None = None
    sort_by: Literal["resources_id", "create_time", "update_time", "version", "resources"] | None = None


@routes.get("/resources", response_model=Page[ResourcesUpdate], responses=errors())
async def query_resources(wanted: Annotated[QueryResources, Query()], database: Database) -> Response:
    """Find resources."""
    found = resources.listing(wanted.resources_id, wanted.resources_id_contains)
    return await listed(database, found, wanted, _fields)


@routes.post("/resources", status_code=201, response_model=ResourcesUpdate, responses=errors())
async def add_resources(body: NamedResources, database: Database) -> Response:
    """Store resources; they are the latest from now on."""
    content = _content(body)
    return Json(_fields(await database.write(lambda connection: resources.add(connection, content))), 201)


@routes.get("/resources/latest", response_model=ResourcesUpdate | None, responses=errors())
async def get_latest_resources(database: Database) -> Response:
    """Find the resources that were added or replaced last; null where there are none."""
    row = await database.read(lambda connection: resources.find(connection, resources.latest_id(connection)))
    return Json(None if row is None else _fields(row))


@routes.get("/resources/{resources_id}", response_model=ResourcesUpdate | None, responses=errors())
async def get_resources(resources_id: Id, database: Database) -> Response:
    """Find resources; null where this id has none."""
    row = await database.read(lambda connection: resources.find(connection, resources_id))
    return Json(None if row is None else _fields(row))


@routes.post("/resources/{resources_id}", response_model=ResourcesUpdate, responses=errors())
async def update_resources(resources_id: Id, body: NamedResources, database: Database) -> Response:
    """Replace resources, or store them under an id of the client's; they are the latest from now on."""
    content = _content(body)
    return Json(_fields(await database.write(lambda connection: resources.put(connection, resources_id, content))))


def _content(body: NamedResources) -> dict[str, Any]:
    return {name: each.model_dump() for name, each in body.items()}


def _fields(row: Any) -> dict[str, Any]:
    return resources.resources_fields(row, document)
