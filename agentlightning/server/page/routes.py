"""Routes of the web pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import HTTPException, Query, Request, Response
from fastapi.responses import FileResponse

from agentlightning.server.errors import sentence
from agentlightning.server.middleware.origins import is_from_own_page
from agentlightning.server.page.annotation import Annotation
from agentlightning.server.page.api_reference import ApiReference, api_reference_of
from agentlightning.server.page.comparison import ComparisonQuery, comparison_values
from agentlightning.server.page.conversation import unassigned_calls
from agentlightning.server.page.drift_page import CALLS_COMPARED, IDS_COMPARED, DriftQuery, Tree, drift_values, trees_of
from agentlightning.server.page.export import EXPORTS, ExportQuery, export
from agentlightning.server.page.generation import choice_values, generation_texts, prompt_tokens, token_values
from agentlightning.server.page.overview_page import OverviewQuery, overview_values
from agentlightning.server.page.rendering import STATIC, address_of, own_address, page
from agentlightning.server.page.rollout import rollout_values, state_of
from agentlightning.server.page.rollout_table import TableQuery, table_of
from agentlightning.server.page.sender_table import sender_row
from agentlightning.server.routes.common import Database, router
from agentlightning.server.schemas import Id
from agentlightning.server.summaries import is_current
from agentlightning.store import senders

__all__ = ["routes"]

FILES = {path.name: path for path in STATIC.iterdir()}
# A day: each release has addresses of its own.
CACHED = {"Cache-Control": "private, max-age=86400"}
NANOSECONDS = 1_000_000_000
HOUR = 3600
REFUSAL = "rewards and notes are taken from pages of this server alone: a program posts rewards to /v1/agl"
WITHOUT_PARQUET = "Parquet needs pyarrow where the store runs: pip install pyarrow"

Index = Annotated[int, Query(ge=0, le=(1 << 63) - 1)]

routes = router("page", prefix="")


@routes.get("/", include_in_schema=False)
async def show_overview(request: Request, query: Annotated[OverviewQuery, Query()], database: Database) -> Response:
    """Show what all rollouts did over time, by step or by weights; nothing if it is as it was `seen`."""
    if query.seen and await database.read(lambda connection: is_current(connection, query.seen)):
        return Response(status_code=204)
    await request.app.state.drift.look()
    is_all = await request.app.state.summaries.look()
    found = await database.read(lambda connection: overview_values(connection, query))
    return page(request, "overview.html", **found, is_all=is_all, address=own_address(request))


@routes.get("/rollouts", include_in_schema=False)
async def show_rollouts(request: Request, query: Annotated[TableQuery, Query()], database: Database) -> Response:
    """Show the table of rollouts; nothing if it is as it was `seen`."""
    if query.seen and await database.read(lambda connection: is_current(connection, query.seen)):
        return Response(status_code=204)
    if "" in request.query_params.values():
        # A form sends its empty fields, too: an address to share has none.
        return Response(status_code=303, headers={"Location": address_of(request, "/rollouts", **query.address())})
    await request.app.state.drift.look()
    is_all = await request.app.state.summaries.look()
    found = await database.read(lambda connection: table_of(connection, query))
    return page(request, "rollouts.html", **found, is_all=is_all, exports=EXPORTS, address=own_address(request))


@routes.get("/rollouts/export", include_in_schema=False)
async def export_rollouts(query: Annotated[ExportQuery, Query()], request: Request, database: Database) -> Response:
    """Write what the table shows, all pages of it, to a file."""
    _, problems = query.read()
    if problems or query.format not in EXPORTS:
        raise HTTPException(422, "; ".join(problems) or WITHOUT_PARQUET)
    names = [name for name, _ in request.query_params.multi_items() if name != "columns"]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HTTPException(422, f"{twice[0]} is given twice")
    if not await request.app.state.summaries.finish():
        return sentence(503, "the list of rollouts cannot be brought up to date; the server's log says why")
    return await export(database, query)


@routes.get("/rollout", include_in_schema=False)
async def show_rollout(
    request: Request,
    database: Database,
    rollout_id: Annotated[Id | None, Query(alias="id")] = None,
    agent_id: Id | None = None,
    parent_agent_id: Id | None = None,
    purpose: Id | None = None,
    retry: Annotated[int | None, Query(ge=0, le=(1 << 31) - 1)] = None,
    seen: str = "",
) -> Response:
    """Show one rollout, with all calls or those that say this of their callers; without an id, calls without one.

    Nothing is shown if the rollout is as it was `seen`.
    """
    given = {"agent_id": agent_id, "parent_agent_id": parent_agent_id, "purpose": purpose, "retry": retry}
    wanted = {name: value for name, value in given.items() if value is not None}

    if rollout_id is None:
        return page(request, "calls.html", calls=await database.read(unassigned_calls))
    if seen and seen == await database.read(lambda connection: state_of(connection, rollout_id)):
        return Response(status_code=204)
    found = await database.read(lambda connection: rollout_values(connection, rollout_id, wanted))
    if found is None:
        return _not_found(request, f"There is no rollout {rollout_id!r}", "Nothing in this store has this id.")
    ids = sum(each.prompt_tokens for each in found["attempts"])
    is_comparable = found["count"] <= CALLS_COMPARED
    compares = is_comparable and ids <= IDS_COMPARED
    trees = await _trees(request, rollout_id) if compares else None
    shown = {"rollout_id": rollout_id, "trees": trees, "compares": compares, "is_comparable": is_comparable}
    return page(request, "rollout.html", **shown, **found)


@routes.get("/rollout/prompts", include_in_schema=False)
async def show_prompts(request: Request, rollout_id: Annotated[Id, Query(alias="id")]) -> Response:
    """Show the prompts of a rollout as trees: a part of its page that is loaded on demand where it takes long."""
    return page(request, "prompts.html", trees=await _trees(request, rollout_id))


async def _trees(request: Request, rollout_id: str) -> Sequence[Tree] | None:
    attempts = await request.app.state.drift.attempts(rollout_id)
    return None if attempts is None else trees_of(attempts)


@routes.get("/compare", include_in_schema=False)
async def show_comparison(request: Request, query: Annotated[ComparisonQuery, Query()], database: Database) -> Response:
    """Show two rollouts or attempts side by side; with one alone, those that it can be compared with."""
    found = await database.read(lambda connection: comparison_values(connection, query))
    if found is None:
        return _not_found(request, "One of these is not here", "Nothing in this store has this id.")
    return page(request, "compare.html", **found)


@routes.get("/generation", include_in_schema=False)
async def show_generation(
    request: Request,
    database: Database,
    generation_id: Annotated[Id, Query(alias="id")],
    choice: Index = 0,
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
    return page(request, "prompt.html", id=generation_id, tokens=found)


@routes.get("/generation/token", include_in_schema=False)
async def show_token(
    request: Request,
    database: Database,
    generation_id: Annotated[Id, Query(alias="id")],
    at: Index,
    of: Literal["prompt", "answer"] = "answer",
    choice: Index = 0,
) -> Response:
    """Show what else could have been at a token, and its neighbours: loaded when it is chosen."""
    found = await database.read(lambda connection: token_values(connection, generation_id, choice, of, at))
    if found is None:
        return _not_found(request, "There is no such token", "The generation may be in another store.")
    return page(request, "token.html", **found)


@routes.get("/generation/text", include_in_schema=False)
async def show_text(request: Request, database: Database, generation_id: Annotated[Id, Query(alias="id")]) -> Response:
    """Show the texts of a generation as they are: a long part of a rollout's page, loaded on demand."""
    found = await database.read(lambda connection: generation_texts(connection, generation_id))
    if found is None:
        return _not_found(request, f"There is no generation {generation_id!r}", "It may be in another store.")
    return page(request, "text.html", id=generation_id, **found)


@routes.post("/annotations", include_in_schema=False)
async def add_annotation(request: Request, database: Database) -> Response:
    """Keep a reward or a note that a person gives on a page of this server."""
    if not is_from_own_page(request.scope):
        return sentence(403, REFUSAL)
    sent = Annotation.of_form(await request.body())
    await database.write(sent.add)
    path, query = sent.target
    return Response(status_code=303, headers={"Location": f"{address_of(request, path, **query)}#annotations"})


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
