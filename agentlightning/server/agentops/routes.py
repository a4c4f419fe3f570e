"""What the AgentOps SDK (0.4) calls besides OTLP: logins, uploads, and what its validation reads."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import Connection

from agentlightning.errors import NotFound
from agentlightning.server.agentops.calls import Seen, seen, total
from agentlightning.server.agentops.tokens import Token
from agentlightning.server.answers import Json
from agentlightning.server.errors import sentence
from agentlightning.server.headers import header
from agentlightning.server.keys import token_of
from agentlightning.server.models import agentops as models
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import Id
from agentlightning.server.transactions import Transactions
from agentlightning.store import sessions, uploads
from agentlightning.store.attributes import TAGS

__all__ = ["routes"]

TRACE_ID_BITS = 128
KIND = "agentops.span.kind"

logger = logging.getLogger("agentlightning.agentops")

routes = router("agentops", prefix="")


def _token(request: Request) -> Token:
    token = token_of(request.scope)
    if token is None:
        raise HTTPException(401, "a token is missing: POST /v3/auth/token trades a key for one")
    return token


Sender = Annotated[Token, Depends(_token)]
"""The parameter of a route that needs a token."""


@routes.post("/v3/auth/token", response_model=models.Login, responses=errors())
async def log_in(key: models.Key, request: Request) -> Response:
    """Trade the key of this store, or where it has none any key, for a token."""
    sent, token = _traded(key, request)
    client = request.client.host if request.client else "somebody"
    request.app.state.clients.has_come(
        token.id, f"{(header(request.scope, 'user-agent') or 'a client')[:200]} at {client}"
    )
    return Json({"token": sent, "project_id": token.project_id, "project_prem_status": "pro"})


@routes.post("/public/v1/auth/access_token", response_model=models.Bearer, responses=errors())
async def log_in_to_read(key: models.Key, request: Request) -> Response:
    """The same, for the SDK's validation, which sends nothing."""
    sent, _ = _traded(key, request)
    return Json({"bearer": sent})


@routes.post("/v4/logs/upload/", response_model=models.Uploaded, responses=errors())
async def upload_logs(upload: models.Upload, request: Request, sender: Sender, database: Database) -> Response:
    """Keep what an agent has printed; the header `Trace-Id`, in decimal, says in which session."""
    return await _upload("logs", upload, request, sender, database)


@routes.post("/v4/objects/upload/", response_model=models.Uploaded, responses=errors())
async def upload_object(upload: models.Upload, request: Request, sender: Sender, database: Database) -> Response:
    """Keep an object."""
    return await _upload("objects", upload, request, sender, database)


@routes.get("/v4/{kind}/{upload_id}", response_class=PlainTextResponse, responses=errors(404))
async def get_upload(kind: uploads.Kind, upload_id: Id, database: Database) -> Response:
    """What was uploaded."""
    body = await database.read(lambda connection: uploads.find(connection, kind, upload_id))
    if body is None:
        return sentence(404, "there is no such upload")
    # Whatever is in it, a browser shows it as a text.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
    return Response(body, headers=headers, media_type="text/plain; charset=utf-8")


@routes.get("/public/v1/traces/{trace_id}", response_model=models.Trace, responses=errors(404))
async def get_trace(trace_id: Id, sender: Sender, database: Database) -> Response:
    """A trace with its spans."""

    def work(connection: Connection) -> dict[str, Any]:
        found = _seen(connection, trace_id, sender)
        tags = [str(tag) for each in found for tag in _tags(each)]
        return {
            "trace_id": trace_id,
            "project_id": sender.project_id,
            "tags": list(dict.fromkeys(tags)),
            "spans": [_span(each) for each in found],
        }

    return Json(await database.read(work))


@routes.get("/public/v1/traces/{trace_id}/metrics", response_model=models.Metrics, responses=errors(404))
async def get_metrics(trace_id: Id, sender: Sender, database: Database) -> Response:
    """How many tokens it took."""
    prompt, response = await database.read(lambda connection: total(_seen(connection, trace_id, sender)))
    return Json(
        {
            "total_tokens": prompt + response,
            "prompt_tokens": prompt,
            "completion_tokens": response,
            "total_cost": "0.0000",
        }
    )


def _traded(key: models.Key, request: Request) -> tuple[str, Token]:
    traded = request.app.state.tokens.trade(key.api_key)
    if traded is None:
        logger.warning("a key that is not that of this store was refused: AGENTOPS_API_KEY is another")
        raise HTTPException(401, "the key is not that of this store: AGENTOPS_API_KEY has to be its AGL_STORE_KEY")
    return traded


async def _upload(
    kind: uploads.Kind, upload: models.Upload, request: Request, sender: Token, database: Transactions
) -> Response:
    body = upload.body.encode("utf-8", "replace")
    trace_id = _trace_id(header(request.scope, "trace-id"))
    upload_id = await database.write(
        lambda connection: uploads.add(connection, kind, sender.project_id, trace_id, body)
    )
    return Json({"url": f"{request.base_url}v4/{kind}/{upload_id}", "size": len(body)})


def _trace_id(sent: str | None) -> str | None:
    """In hexadecimal, as a span has it."""
    if sent is None:
        return None
    if len(sent) <= TRACE_ID_BITS and sent.isascii() and sent.isdecimal() and int(sent) < 1 << TRACE_ID_BITS:
        return f"{int(sent):032x}"
    raise HTTPException(422, f"Trace-Id: {sent[:100]!r} is no decimal number of {TRACE_ID_BITS} bits")


def _seen(connection: Connection, trace_id: str, sender: Token) -> list[Seen]:
    found = sessions.find(connection, trace_id)
    if found is None or found.project_id != sender.project_id:
        raise NotFound(f"there is no trace {trace_id!r} in this project")
    return seen(connection, trace_id)


def _tags(found: Seen) -> list[Any]:
    tags = found.attributes.get(TAGS)
    return tags if isinstance(tags, list) else []


def _span(found: Seen) -> dict[str, Any]:
    row, status = found.row, found.body["status"]
    return {
        "span_id": row.span_id,
        "parent_span_id": row.parent_id,
        "span_name": row.name,
        "span_kind": str(found.attributes.get(KIND) or found.body.get("kind") or "INTERNAL"),
        "start_time": _moment(row.start_time),
        "end_time": _moment(row.end_time),
        "duration": None if found.seconds is None else found.seconds * 1e3,
        "status_code": status["status_code"],
        "status_message": status.get("description"),
        "span_attributes": found.attributes,
    }


def _moment(seconds: float | None) -> str | None:
    with suppress(ValueError, OverflowError):
        return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    # Of a year that no calendar has.
    return None
