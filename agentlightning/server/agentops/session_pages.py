"""Web pages of sessions, to which the link leads that the AgentOps SDK prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query, Request, Response
from sqlalchemy import Connection

from agentlightning.server.agentops.silent_clients import CAUSE
from agentlightning.server.agentops.trace import TraceSpan, spans_of_trace, token_totals
from agentlightning.server.page.rendering import page
from agentlightning.server.page.timeline import MAX_DEPTH, in_tree
from agentlightning.server.routes.common import Database, router
from agentlightning.server.schemas import Id
from agentlightning.store import rollouts, sessions, uploads

__all__ = ["routes"]

SESSIONS_SHOWN = 100

routes = router("agentops", prefix="")


@routes.get("/sessions", include_in_schema=False)
async def show_sessions(
    request: Request, database: Database, trace_id: Annotated[Id | None, Query()] = None
) -> Response:
    """Show a session; without a trace_id, the newest sessions and the clients that sent none."""
    if trace_id is None:
        found = await database.read(_latest)
        silent = request.app.state.clients.silent()
        return page(request, "sessions.html", sessions=found, silent=silent, cause=CAUSE)
    values = await database.read(lambda connection: _session(connection, trace_id))
    if values is None:
        title = f"There is no session {trace_id!r}"
        return page(request, "error.html", 404, title=title, text="Nothing in this store has this trace id.")
    return page(request, "session.html", **values)


def _latest(connection: Connection) -> list[tuple[Any, str]]:
    """Return the newest sessions, each with its status."""
    return [(each, _status(connection, each)) for each in sessions.latest(connection, SESSIONS_SHOWN)]


def _session(connection: Connection, trace_id: str) -> dict[str, Any] | None:
    session = sessions.find(connection, trace_id)
    if session is None:
        return None
    found = spans_of_trace(connection, trace_id)
    prompt, response = token_totals(found)
    return {
        "session": session,
        "status": _status(connection, session),
        "prompt_tokens": prompt,
        "output_tokens": response,
        "uploads": uploads.list_for_trace(connection, trace_id),
        "spans": _in_tree(found),
    }


def _in_tree(found: Sequence[TraceSpan]) -> list[tuple[int, TraceSpan]]:
    tree = in_tree(found, lambda each: each.row.span_id, lambda each: each.row.parent_id)
    return [(min(depth, MAX_DEPTH), each) for depth, each in tree]


def _status(connection: Connection, session: Any) -> str:
    found = rollouts.find(connection, session.rollout_id)
    if found is None:
        # Only spans and calls name this rollout, so only the session's root span tells how it ended.
        return sessions.outcome(connection, session.trace_id) or "running"
    # The rollout row has the status of its latest attempt alone.
    return found.attempt_status if found.attempt_id == session.attempt_id else "superseded by a later attempt"
