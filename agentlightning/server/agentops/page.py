"""The page behind the link that the AgentOps SDK prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query, Request, Response
from sqlalchemy import Connection

from agentlightning.server.agentops.calls import Seen, seen, total
from agentlightning.server.agentops.clients import CAUSE
from agentlightning.server.page.rendering import page as rendered
from agentlightning.server.page.tree import DEEPEST, in_tree
from agentlightning.server.routes.common import Database, router
from agentlightning.server.schemas import Id
from agentlightning.store import rollouts, sessions, uploads

__all__ = ["page"]

SESSIONS_SHOWN = 100

page = router("agentops", prefix="")


@page.get("/sessions", include_in_schema=False)
async def show_sessions(
    request: Request, database: Database, trace_id: Annotated[Id | None, Query()] = None
) -> Response:
    """A session; without a trace_id the newest ones, and the clients that have sent none."""
    if trace_id is None:
        found = await database.read(_latest)
        silent = request.app.state.clients.silent()
        return rendered(request, "sessions.html", sessions=found, silent=silent, cause=CAUSE)
    values = await database.read(lambda connection: _session(connection, trace_id))
    if values is None:
        title = f"There is no session {trace_id!r}"
        return rendered(request, "nothing.html", 404, title=title, text="Nothing was sent under it.")
    return rendered(request, "session.html", **values)


def _latest(connection: Connection) -> list[tuple[Any, str]]:
    """The newest sessions, each with how it is."""
    return [(each, _status(connection, each)) for each in sessions.latest(connection, SESSIONS_SHOWN)]


def _session(connection: Connection, trace_id: str) -> dict[str, Any] | None:
    session = sessions.find(connection, trace_id)
    if session is None:
        return None
    found = seen(connection, trace_id)
    prompt, response = total(found)
    return {
        "session": session,
        "status": _status(connection, session),
        "prompt_tokens": prompt,
        "output_tokens": response,
        "uploads": uploads.list_for_trace(connection, trace_id),
        "spans": _in_tree(found),
    }


def _in_tree(found: Sequence[Seen]) -> list[tuple[int, Seen]]:
    tree = in_tree(found, lambda each: each.row.span_id, lambda each: each.row.parent_id)
    return [(min(depth, DEEPEST), each) for depth, each in tree]


def _status(connection: Connection, session: Any) -> str:
    found = rollouts.find(connection, session.rollout_id)
    if found is None:
        return "of a rollout that is not in this store"
    # Only of the latest attempt: that of another is its own, and not this page's.
    return found.attempt_status if found.attempt_id == session.attempt_id else "an attempt before the latest"
