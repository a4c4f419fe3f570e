"""Routes of the web pages."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy import Connection

from agentlightning.server.page.api_reference import ApiReference, api_reference_of
from agentlightning.server.page.conversation import conversation_of, unassigned_calls
from agentlightning.server.page.drift_page import CALLS_COMPARED, DriftQuery, drift_values, trees_of
from agentlightning.server.page.generation import choice_values, prompt_tokens
from agentlightning.server.page.rendering import STATIC, page
from agentlightning.server.page.rollout_table import TableQuery, absence_of, progress_of, table_of
from agentlightning.server.page.sender_table import sender_row
from agentlightning.server.page.timeline import timeline_of
from agentlightning.server.routes.common import Database, router
from agentlightning.server.schemas import Id
from agentlightning.store import rollouts, senders

__all__ = ["routes"]

FILES = {path.name: path for path in STATIC.iterdir()}
# A day: each release has addresses of its own.
CACHED = {"Cache-Control": "private, max-age=86400"}
NANOSECONDS = 1_000_000_000
HOUR = 3600

routes = router("page", prefix="")


@routes.get("/", include_in_schema=False)
async def show_rollouts(request: Request, query: Annotated[TableQuery, Query()], database: Database) -> Response:
    """Show the table of rollouts."""
    await request.app.state.drift.look()
    found = await database.read(lambda connection: table_of(connection, query))
    return page(request, "rollouts.html", **found, address=str(request.base_url).rstrip("/"))


@routes.get("/rollout", include_in_schema=False)
async def show_rollout(
    request: Request,
    database: Database,
    rollout_id: Annotated[Id | None, Query(alias="id")] = None,
    agent_id: Id | None = None,
    parent_agent_id: Id | None = None,
    purpose: Id | None = None,
    retry: Annotated[int | None, Query(ge=0, le=(1 << 31) - 1)] = None,
) -> Response:
    """Show one rollout, with all calls or those that say this of their callers; without an id, calls without one."""
    given = {"agent_id": agent_id, "parent_agent_id": parent_agent_id, "purpose": purpose, "retry": retry}
    wanted = {name: value for name, value in given.items() if value is not None}

    def read(connection: Connection) -> dict[str, Any] | None:
        if rollout_id is None:
            return {"calls": unassigned_calls(connection)}
        found = rollouts.find(connection, rollout_id)
        conversation = conversation_of(connection, rollout_id, wanted)
        calls = conversation.calls
        shown = timeline_of(connection, rollout_id, found, calls)
        if found is None and not shown.rows:
            return None
        has_answers = any(call.status == "finished" for call in calls)
        absence = None if has_answers else absence_of(connection, rollout_id, found)
        progress = progress_of(connection, rollout_id, found, calls)
        return {
            "calls": conversation.matching,
            "callers": conversation.callers,
            "wanted": wanted,
            "count": conversation.count,
            "more_calls": conversation.left_out,
            "timeline": shown,
            "rollout": found,
            "absence": absence,
            "progress": progress,
        }

    found = await database.read(read)
    if found is None:
        return _not_found(request, f"There is no rollout {rollout_id!r}", "Nothing in this store has this id.")
    if rollout_id is None:
        return page(request, "calls.html", **found)
    compares = found["count"] <= CALLS_COMPARED
    attempts = await request.app.state.drift.attempts(rollout_id) if compares else None
    trees = None if attempts is None else trees_of(attempts)
    return page(request, "rollout.html", rollout_id=rollout_id, trees=trees, compares=compares, **found)


@routes.get("/generation", include_in_schema=False)
async def show_generation(
    request: Request,
    database: Database,
    generation_id: Annotated[Id, Query(alias="id")],
    choice: Annotated[int, Query(ge=0, le=(1 << 63) - 1)] = 0,
) -> Response:
    """Show one generation, and one of its choices."""
    found = await database.read(lambda connection: choice_values(connection, generation_id, choice))
    if found is None:
        return _not_found(request, f"There is no generation {generation_id!r}", "It may be in another store.")
    return page(request, "generation.html", **found)


@routes.get("/generation/prompt", include_in_schema=False)
async def show_prompt(
    request: Request, database: Database, generation_id: Annotated[Id, Query(alias="id")]
) -> Response:
    """Show the tokens of a generation's prompt: a long part of its page, loaded on demand."""
    found = await database.read(lambda connection: prompt_tokens(connection, generation_id))
    if found is None:
        return _not_found(request, f"There is no generation {generation_id!r}", "It may be in another store.")
    return page(request, "prompt.html", tokens=found)


@routes.get("/drift", include_in_schema=False)
async def show_drift(request: Request, query: Annotated[DriftQuery, Query()], database: Database) -> Response:
    """Show the causes of breaks over time."""
    is_all = await request.app.state.drift.look()
    found = await database.read(lambda connection: drift_values(connection, query))
    return page(request, "drift.html", **found, is_all=is_all)


@routes.get("/senders", include_in_schema=False)
async def show_senders(request: Request, database: Database) -> Response:
    """Show the senders of the last hour."""
    now = time.time_ns()
    found = await database.read(lambda connection: senders.recent(connection, now - HOUR * NANOSECONDS))
    return page(request, "senders.html", senders=[sender_row(each, now) for each in found])


@routes.get("/docs", include_in_schema=False)
async def show_api_reference(request: Request) -> Response:
    """Show the reference of the HTTP API."""
    state = request.app.state
    api: ApiReference | None = getattr(state, "api_reference", None)
    if api is None:
        api = state.api_reference = api_reference_of(request.app.openapi())
    return page(request, "docs.html", api=api, asks_for_key=state.asks_for_key)


@routes.get("/page/{version}/{name}", include_in_schema=False)
async def show_file(version: str, name: str) -> Response:
    """Serve a script or stylesheet: always this release's, whichever version is in the address."""
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FILES[name], headers={**CACHED, "X-Content-Type-Options": "nosniff"})


def _not_found(request: Request, title: str, text: str) -> Response:
    return page(request, "error.html", 404, title=title, text=text)
