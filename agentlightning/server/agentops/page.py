"""The page behind the link that the AgentOps SDK prints: plain HTML, without a script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from html import escape
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import Connection

from agentlightning.server.agentops.calls import Call, Seen, seen, total
from agentlightning.server.agentops.clients import CAUSE, Client
from agentlightning.server.models.common import Id
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import rollouts, sessions, uploads
from agentlightning.store.rollouts import Unknown

__all__ = ["page"]

SESSIONS_SHOWN = 100
DEEPEST_INDENT = 30
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.5em;margin:.3em 0}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.2em 1em .2em 0}"
    ".span{border-left:2px solid #ccc;padding:.2em .6em;margin:.4em 0}.ERROR{border-color:#c00}.note{color:#777}"
)

page = router("agentops", prefix="")


@page.get("/sessions", response_class=HTMLResponse, responses=errors(404))
async def show_sessions(
    request: Request, database: Database, trace_id: Annotated[Id | None, Query()] = None
) -> Response:
    """A session, as a page; without a trace_id the newest ones, and the clients that have sent none."""
    if trace_id is not None:
        title, parts = await database.read(lambda connection: _session(connection, trace_id))
    else:
        silent = request.app.state.clients.silent()
        title, parts = await database.read(lambda connection: _sessions(connection, silent))
    return HTMLResponse(_document(title, parts), headers=HEADERS)


def _sessions(connection: Connection, silent: Sequence[Client]) -> tuple[str, list[str]]:
    parts = [f'<p class="ERROR">{escape(each.name)} has got a token, and sent no trace yet.</p>' for each in silent]
    if silent:
        parts.append(f'<p class="note">Where it should have: {escape(CAUSE)}.</p>')
    rows = []
    for each in sessions.latest(connection, SESSIONS_SHOWN):
        link = f'<a href="/sessions?trace_id={escape(each.trace_id)}">{escape(each.trace_id)}</a>'
        rows.append((link, escape(each.rollout_id), escape(_status(connection, each))))
    parts.append(_table(("session", "rollout", "status"), rows) if rows else "<p>There are no sessions yet.</p>")
    return "Sessions", parts


def _session(connection: Connection, trace_id: str) -> tuple[str, list[str]]:
    session = sessions.find(connection, trace_id)
    if session is None:
        raise Unknown(f"there is no session {trace_id!r}")
    found = seen(connection, trace_id)
    prompt, response = total(found)
    about = [
        ("trace", session.trace_id),
        ("rollout", session.rollout_id),
        ("attempt", session.attempt_id),
        ("status", _status(connection, session)),
        ("project", session.project_id),
        ("token ids", f"{prompt} of prompts, {response} of responses"),
    ]
    parts = ["<table>", *(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in about), "</table>"]
    for upload in uploads.of_trace(connection, trace_id):
        path = f"/v4/{escape(upload.kind)}/{escape(upload.upload_id)}"
        parts.append(f'<p><a href="{path}">{escape(upload.kind)}</a>, {upload.size} bytes</p>')
    parts += (_span(depth, each) for depth, each in _tree(found))
    return f"Session {trace_id}", parts


def _status(connection: Connection, session: Any) -> str:
    found = rollouts.find(connection, session.rollout_id)
    if found is None:
        return "of a rollout that is not in this store"
    # Only of the latest attempt: that of another is its own, and not this page's.
    return found.attempt_status if found.attempt_id == session.attempt_id else "an attempt before the latest"


def _tree(found: Sequence[Seen]) -> Iterator[tuple[int, Seen]]:
    """Each span with how deep it is, parents before their children; all of them, whatever they say of each other."""
    known = {each.row.span_id for each in found}
    children: defaultdict[str | None, list[Seen]] = defaultdict(list)
    for each in found:
        children[each.row.parent_id if each.row.parent_id in known else None].append(each)
    shown: set[int] = set()
    # Those of a circle have a parent each, and are not below any root.
    for root in [*children[None], *found]:
        waiting = [(0, root)]
        while waiting:
            depth, each = waiting.pop()
            if each.row.key not in shown:
                shown.add(each.row.key)
                yield depth, each
                waiting += ((depth + 1, child) for child in reversed(children[each.row.span_id]))


def _span(depth: int, found: Seen) -> str:
    row, status = found.row, found.body["status"]
    code = status["status_code"] if status["status_code"] in ("OK", "ERROR") else "UNSET"
    told = [f"<b>{escape(row.name)}</b>", code]
    if found.seconds is not None:
        told.append(f"{found.seconds:.3f} s from {_moment(row.start_time)}")
    parts = [" · ".join(told)]
    if status.get("description"):
        parts.append(f"<pre>{escape(str(status['description']))}</pre>")
    if found.call is not None:
        parts += _call(found.call)
    indent = 1.5 * min(depth, DEEPEST_INDENT)
    return f'<div class="span {code}" style="margin-left:{indent}em">{"".join(parts)}</div>'


def _call(call: Call) -> Iterator[str]:
    whose = "recorded by vLLM" if call.is_recorded else "as the span says: vLLM has recorded none"
    yield (
        f'<div class="note">{escape(call.response_id or "without an id")}: {_count(call.prompt_ids)} prompt ids, '
        f"{_count(call.response_ids)} response ids, {whose}</div>"
    )
    for text in (call.prompt, call.response):
        if text is not None:
            yield f"<pre>{escape(text)}</pre>"


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _moment(seconds: float) -> str:
    with suppress(ValueError, OverflowError):
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(sep=" ", timespec="milliseconds")
    # Of a year that no calendar has.
    return f"{seconds} s"


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of cells that are HTML."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _document(title: str, parts: Iterable[str]) -> str:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    document = f"{head}<h1>{escape(title)}</h1>{''.join(parts)}</html>"
    # Halves of surrogate pairs are no characters that could be sent.
    return document.encode("utf-8", "replace").decode()
