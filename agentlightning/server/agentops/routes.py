"""Routes that the AgentOps SDK (0.4) calls besides OTLP: logins, uploads, and its validation."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from agentlightning.errors import NotFound
from agentlightning.server.agentops.access_tokens import AccessToken
from agentlightning.server.agentops.trace import TraceSpan, spans_of_trace, token_totals
from agentlightning.server.answers import Json
from agentlightning.server.decoding import header
from agentlightning.server.errors import sentence
from agentlightning.server.middleware.api_key import token_of
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import Id, Sent, example
from agentlightning.server.transactions import Transactions
from agentlightning.store import sessions, uploads
from agentlightning.store.attributes import TAGS

__all__ = ["routes"]

TRACE_ID_BITS = 128
KIND = "agentops.span.kind"

logger = logging.getLogger("agentlightning.agentops")

routes = router("agentops", prefix="")


class Key(Sent):
    """A request for a token."""

    model_config = example(api_key="the key of this store")

    api_key: str = Field(min_length=1, max_length=4096)


class Login(BaseModel):
    """A token."""

    token: str
    project_id: str
    project_prem_status: str


class Bearer(BaseModel):
    """A token for the validation of the SDK."""

    bearer: str


class Upload(Sent):
    """Output of an agent, or an object."""

    model_config = example(body="2026-11-24 10:30:00,000 - INFO - hello")

    body: str


class Uploaded(BaseModel):
    """Location of an upload."""

    url: str
    size: int = Field(description="Bytes.")


class SessionSpan(BaseModel):
    """A span. Durations are milliseconds; times are UTC in ISO 8601."""

    span_id: str
    parent_span_id: str | None
    span_name: str
    span_kind: str
    start_time: str | None
    end_time: str | None
    duration: float | None
    status_code: str
    status_message: str | None
    span_attributes: dict[str, Any]


class Trace(BaseModel):
    """A trace."""

    trace_id: str
    project_id: str
    tags: list[str]
    spans: list[SessionSpan]


class Metrics(BaseModel):
    """Token counts of a trace: those that vLLM recorded, or else those that the spans report."""

    total_tokens: int
    prompt_tokens: int
    completion_tokens: int
    total_cost: str


def _token(request: Request) -> AccessToken:
    token = token_of(request.scope)
    if token is None:
        raise HTTPException(401, "the token is missing: get one for a key from POST /v3/auth/token")
    return token


TokenDep = Annotated[AccessToken, Depends(_token)]
"""The parameter of a route that needs a token."""


@routes.post("/v3/auth/token", response_model=Login, responses=errors())
async def log_in(key: Key, request: Request) -> Response:
    """Trade the key of this store for a token; without a key, any is accepted."""
    sent, token = _traded(key, request)
    client = request.client.host if request.client else "an unknown address"
    request.app.state.clients.add(token.id, f"{(header(request.scope, 'user-agent') or 'a client')[:200]} at {client}")
    return Json({"token": sent, "project_id": token.project_id, "project_prem_status": "pro"})


@routes.post("/public/v1/auth/access_token", response_model=Bearer, responses=errors())
async def log_in_to_read(key: Key, request: Request) -> Response:
    """Trade a key for a token that the SDK's validation reads traces with."""
    sent, _ = _traded(key, request)
    return Json({"bearer": sent})


@routes.post("/v4/logs/upload/", response_model=Uploaded, responses=errors())
async def upload_logs(upload: Upload, request: Request, token: TokenDep, database: Database) -> Response:
    """Keep the output of an agent; the header `Trace-Id`, in decimal, names the session."""
    return await _upload("logs", upload, request, token, database)


@routes.post("/v4/objects/upload/", response_model=Uploaded, responses=errors())
async def upload_object(upload: Upload, request: Request, token: TokenDep, database: Database) -> Response:
    """Keep an object; the header `Trace-Id`, in decimal, names the session."""
    return await _upload("objects", upload, request, token, database)


@routes.get("/v4/{kind}/{upload_id}", response_class=PlainTextResponse, responses=errors(404))
async def get_upload(kind: uploads.Kind, upload_id: Id, database: Database) -> Response:
    """Return an upload as text."""
    body = await database.read(lambda connection: uploads.find(connection, kind, upload_id))
    if body is None:
        return sentence(404, "there is no such upload")
    # A browser shows it as plain text, whatever it contains.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
    return Response(body, headers=headers, media_type="text/plain; charset=utf-8")


@routes.get("/public/v1/traces/{trace_id}", response_model=Trace, responses=errors(404))
async def get_trace(trace_id: Id, token: TokenDep, database: Database) -> Response:
    """Return a trace with its spans."""

    def work(connection: Connection) -> dict[str, Any]:
        found = _spans(connection, trace_id, token)
        tags = [str(tag) for each in found for tag in _tags(each)]
        return {
            "trace_id": trace_id,
            "project_id": token.project_id,
            "tags": list(dict.fromkeys(tags)),
            "spans": [_span(each) for each in found],
        }

    return Json(await database.read(work))


@routes.get("/public/v1/traces/{trace_id}/metrics", response_model=Metrics, responses=errors(404))
async def get_metrics(trace_id: Id, token: TokenDep, database: Database) -> Response:
    """Return the number of tokens of a trace."""
    prompt, response = await database.read(lambda connection: token_totals(_spans(connection, trace_id, token)))
    return Json(
        {
            "total_tokens": prompt + response,
            "prompt_tokens": prompt,
            "completion_tokens": response,
            "total_cost": "0.0000",
        }
    )


def _traded(key: Key, request: Request) -> tuple[str, AccessToken]:
    traded = request.app.state.tokens.trade(key.api_key)
    if traded is None:
        logger.warning("refused a login: its AGENTOPS_API_KEY is not the AGL_STORE_KEY of this store")
        raise HTTPException(401, "wrong key: set AGENTOPS_API_KEY to the AGL_STORE_KEY of this store")
    return traded


async def _upload(
    kind: uploads.Kind, upload: Upload, request: Request, token: AccessToken, database: Transactions
) -> Response:
    body = upload.body.encode("utf-8", "replace")
    trace_id = _trace_id(header(request.scope, "trace-id"))
    upload_id = await database.write(lambda connection: uploads.add(connection, kind, token.project_id, trace_id, body))
    return Json({"url": f"{request.base_url}v4/{kind}/{upload_id}", "size": len(body)})


def _trace_id(sent: str | None) -> str | None:
    """Convert a trace id to hexadecimal, as spans have it."""
    if sent is None:
        return None
    if len(sent) <= TRACE_ID_BITS and sent.isascii() and sent.isdecimal() and int(sent) < 1 << TRACE_ID_BITS:
        return f"{int(sent):032x}"
    raise HTTPException(422, f"Trace-Id: {sent[:100]!r} is not a decimal number of at most {TRACE_ID_BITS} bits")


def _spans(connection: Connection, trace_id: str, token: AccessToken) -> list[TraceSpan]:
    found = sessions.find(connection, trace_id)
    if found is None or found.project_id != token.project_id:
        raise NotFound(f"there is no trace {trace_id!r} in this project")
    return spans_of_trace(connection, trace_id)


def _tags(found: TraceSpan) -> list[Any]:
    tags = found.attributes.get(TAGS)
    return tags if isinstance(tags, list) else []


def _span(found: TraceSpan) -> dict[str, Any]:
    row, status = found.row, found.body["status"]
    return {
        "span_id": row.span_id,
        "parent_span_id": row.parent_id,
        "span_name": row.name,
        "span_kind": str(found.attributes.get(KIND) or found.body.get("kind") or "INTERNAL"),
        "start_time": _timestamp(row.start_time),
        "end_time": _timestamp(row.end_time),
        "duration": None if found.seconds is None else found.seconds * 1e3,
        "status_code": status["status_code"],
        "status_message": status.get("description"),
        "span_attributes": found.attributes,
    }


def _timestamp(seconds: float | None) -> str | None:
    with suppress(ValueError, OverflowError):
        return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    # Beyond the years that a calendar has.
    return None
