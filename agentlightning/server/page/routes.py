"""The addresses of the page, and what is read for each."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy import Connection

from agentlightning.server.page import conversation, listing, timeline, tokens
from agentlightning.server.page.listing import Listing
from agentlightning.server.page.rendering import STATIC, page
from agentlightning.server.page.senders import charted
from agentlightning.server.routes.common import Database, router
from agentlightning.server.schemas import Id
from agentlightning.store import rollouts, senders

__all__ = ["routes"]

FILES = {path.name: path for path in STATIC.iterdir()}
# A day: which release of ours it is of is in its address.
CACHED = {"Cache-Control": "private, max-age=86400"}
NANOSECONDS = 1_000_000_000
HOUR = 3600

routes = router("page", prefix="")


@routes.get("/", include_in_schema=False)
async def show_rollouts(request: Request, asked: Annotated[Listing, Query()], database: Database) -> Response:
    """All rollouts."""
    found = await database.read(lambda connection: listing.of_page(connection, asked))
    return page(request, "rollouts.html", **found, address=str(request.base_url).rstrip("/"))


@routes.get("/rollout", include_in_schema=False)
async def show_rollout(
    request: Request, database: Database, rollout_id: Annotated[Id | None, Query(alias="id")] = None
) -> Response:
    """One rollout; without an id, the calls that belong to none."""

    def read(connection: Connection) -> dict[str, Any] | None:
        if rollout_id is None:
            return {"calls": conversation.without_rollout(connection)}
        found = rollouts.find(connection, rollout_id)
        calls, more_calls = conversation.of_rollout(connection, rollout_id)
        shown = timeline.of_rollout(connection, rollout_id, found, calls)
        if found is None and not shown.rows:
            return None
        has_answers = any(call.status == "finished" for call in calls)
        why = None if has_answers else listing.why(connection, rollout_id, None if found is None else found.status)
        return {"calls": calls, "more_calls": more_calls, "timeline": shown, "rollout": found, "absence": why}

    found = await database.read(read)
    if found is None:
        return _nothing(request, f"There is no rollout {rollout_id!r}", "Nothing in this store names it.")
    if rollout_id is None:
        return page(request, "calls.html", **found)
    return page(request, "rollout.html", rollout_id=rollout_id, **found)


@routes.get("/generation", include_in_schema=False)
async def show_generation(
    request: Request,
    database: Database,
    generation_id: Annotated[Id, Query(alias="id")],
    choice: Annotated[int, Query(ge=0, le=(1 << 63) - 1)] = 0,
) -> Response:
    """One generation, and one of its choices."""
    found = await database.read(lambda connection: tokens.of_choice(connection, generation_id, choice))
    if found is None:
        return _nothing(request, f"There is no generation {generation_id!r}", "Was it of another store?")
    return page(request, "generation.html", **found)


@routes.get("/generation/prompt", include_in_schema=False)
async def show_prompt(
    request: Request, database: Database, generation_id: Annotated[Id, Query(alias="id")]
) -> Response:
    """The ids of a generation's prompt: a part of its page, which most do not look at, and may be long."""
    found = await database.read(lambda connection: tokens.of_prompt(connection, generation_id))
    if found is None:
        return _nothing(request, f"There is no generation {generation_id!r}", "Was it of another store?")
    return page(request, "prompt.html", text=found)


@routes.get("/senders", include_in_schema=False)
async def show_senders(request: Request, database: Database) -> Response:
    """Who writes here."""
    now = time.time_ns()
    found = await database.read(lambda connection: senders.recent(connection, now - HOUR * NANOSECONDS))
    return page(request, "senders.html", senders=[charted(each, now) for each in found])


@routes.get("/page/{version}/{name}", include_in_schema=False)
async def show_file(version: str, name: str) -> Response:
    """A script, or a style; whichever version a page asks for, there is the one of this release."""
    if name not in FILES:
        return Response(status_code=404)
    return FileResponse(FILES[name], headers={**CACHED, "X-Content-Type-Options": "nosniff"})


def _nothing(request: Request, title: str, text: str) -> Response:
    return page(request, "nothing.html", 404, title=title, text=text)
