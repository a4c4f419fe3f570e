"""What OpenTelemetry's exporters send: `OTEL_EXPORTER_OTLP_ENDPOINT` is the store."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from sqlalchemy import Connection

from agentlightning.server.decoding import header
from agentlightning.server.errors import sentence
from agentlightning.server.middleware.api_key import token_of
from agentlightning.server.otlp import JSON, ODD_IDS, PROTOBUF, Unreadable, parsed, spans_of, written
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.transactions import Transactions
from agentlightning.store import rollouts, sessions, spans
from agentlightning.store.database import Unkeepable
from agentlightning.store.spans import NewSpan

__all__ = ["routes"]

REASONS_SHOWN = 3

logger = logging.getLogger("agentlightning.store")

routes = router("otlp", prefix="/v1")


def _about(name: str, fields: str, example: Any) -> dict[str, Any]:
    """For the OpenAPI document, what a route of an Export...Service takes and answers."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {"type": "object", "properties": {fields: {"type": ["array", "null"], "items": {"type": "object"}}}}
    content = {JSON: {"schema": body, "example": {fields: example}}, PROTOBUF: binary}
    answer = {
        "description": f"An Export{name}ServiceResponse.",
        "content": {JSON: {"schema": ANSWER}, PROTOBUF: binary},
    }
    request = {"description": f"An Export{name}ServiceRequest.", "required": True, "content": content}
    return {
        "response_class": Response,
        "responses": {200: answer, **errors()},
        "openapi_extra": {"requestBody": request},
    }


ANSWER = {"type": "object", "properties": {"partialSuccess": {"type": "object"}}}
SPAN = {
    "traceId": "0123456789abcdef0123456789abcdef",
    "spanId": "0123456789abcdef",
    "name": "chat",
    "startTimeUnixNano": "1796000000000000000",
    "endTimeUnixNano": "1796000001500000000",
    "attributes": [{"key": "agentlightning.rollout_id", "value": {"stringValue": "ro-1"}}],
}


@routes.post("/traces", **_about("Trace", "resourceSpans", [{"scopeSpans": [{"spans": [SPAN]}]}]))
async def traces(request: Request, database: Database) -> Response:
    """Keep spans: under the rollout and attempt that they, or what sent them, name, or else under their trace.

    With a token of AgentOps they are those of sessions, each of which is an attempt: of that rollout, or of its own.
    """
    answer = ExportTraceServiceResponse()
    token = token_of(request.scope)
    project_id = None if token is None else token.project_id

    async def keep(message: Any, refused: Counter[str]) -> None:
        new, odd = await database.run(lambda: spans_of(message, lambda name: header(request.scope, name), project_id))
        refused[ODD_IDS] += odd
        refused += await _written(database, new, project_id)
        if token is not None and new:
            request.app.state.clients.has_sent(token.id)
        if refused:
            answer.partial_success.rejected_spans = refused.total()
            told = [f"{count} of the spans: {reason}" for reason, count in refused.most_common(REASONS_SHOWN)]
            answer.partial_success.error_message = "; ".join(told)

    return await _export(request, database, ExportTraceServiceRequest(), answer, keep)


async def _written(database: Transactions, new: list[NewSpan], project_id: str | None) -> Counter[str]:
    """Keep spans. Returns how many of them no store can keep, by the reason: all others are kept."""
    try:
        await database.write(lambda connection: _keep(connection, new, project_id))
        return Counter()
    except Unkeepable as error:
        if len(new) == 1:
            return Counter({str(error): 1})
    middle = len(new) // 2
    first = await _written(database, new[:middle], project_id)
    return first + await _written(database, new[middle:], project_id)


@routes.post("/logs", **_about("Logs", "resourceLogs", []))
async def logs(request: Request, database: Database) -> Response:
    """Accept logs, so that exporters are content; they are not kept."""
    return await _export(request, database, ExportLogsServiceRequest(), ExportLogsServiceResponse())


@routes.post("/metrics", **_about("Metrics", "resourceMetrics", []))
async def metrics(request: Request, database: Database) -> Response:
    """Accept metrics, so that exporters are content; they are not kept."""
    return await _export(request, database, ExportMetricsServiceRequest(), ExportMetricsServiceResponse())


async def _export(
    request: Request, database: Transactions, message: Message, answer: Message, keep: Any = None
) -> Response:
    content_type = (header(request.scope, "content-type") or "").partition(";")[0].strip().lower()
    if content_type not in (PROTOBUF, JSON):
        found = repr(content_type[:100]) if content_type else "without a Content-Type"
        return sentence(415, f"OTLP comes as {PROTOBUF} or {JSON}, and this is {found}")
    body = await request.body()
    try:
        refused = await database.run(lambda: parsed(message, body, content_type))
        if keep is not None:
            await keep(message, refused)
    except Unreadable as error:
        return sentence(400, str(error))
    return Response(written(answer, content_type), media_type=content_type)


def _keep(connection: Connection, sent: list[NewSpan], project_id: str | None) -> int:
    # What is done again, where others were in the way of it, begins with what was sent.
    new = [replace(each) for each in sent]
    spans.place_again(connection, new)
    alive: dict[tuple[str, str], str] = {}
    for each in new:
        if each.rollout_id is not None:
            named = (each.rollout_id, each.attempt_id or "")
            if named not in alive:
                alive[named] = _attempt_of(connection, *named)
            each.attempt_id = alive[named]
    own = {} if project_id is None else sessions.join(connection, new, project_id)
    named = {(each.rollout_id, each.attempt_id or "") for each in new if each.rollout_id is not None}
    # In one order, whatever the process: each locks its rollout, and of two that have the same each would wait for the
    # other.
    for rollout_id, attempt_id in sorted(named):
        # Those of rollouts that nobody has made here are kept all the same.
        rollouts.heard_of(connection, rollout_id, attempt_id)
    kept = spans.add(connection, new)
    sessions.end(connection, new, own)
    return kept


def _attempt_of(connection: Connection, rollout_id: str, attempt_id: str) -> str:
    """The attempt that is named, or where none is, the latest of the rollout; empty where there is none."""
    if attempt_id:
        return attempt_id
    found = rollouts.find(connection, rollout_id)
    return (found and found.attempt_id) or ""
