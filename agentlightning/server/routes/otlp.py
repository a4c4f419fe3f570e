"""Routes for exporters of OpenTelemetry: `OTEL_EXPORTER_OTLP_ENDPOINT` is the store's URL."""

from __future__ import annotations

from collections import Counter
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

from agentlightning.errors import InvalidRecord
from agentlightning.server.decoding import header
from agentlightning.server.errors import sentence
from agentlightning.server.middleware.api_key import token_of
from agentlightning.server.otlp import JSON, ODD_IDS, PROTOBUF, Unreadable, parsed, spans_of, written
from agentlightning.server.routes.common import Database, errors, media_type, router, shown
from agentlightning.server.transactions import Transactions
from agentlightning.store import ingestion
from agentlightning.store.database import insert_valid
from agentlightning.store.spans import NewSpan

__all__ = ["routes"]

REASONS_SHOWN = 3

routes = router("otlp", prefix="/v1")


def _about(name: str, fields: str, example: Any) -> dict[str, Any]:
    """Describe the request and the answer of an Export...Service for the OpenAPI document."""
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
    """Store spans under the rollout and attempt that they, or their resource, name, or else under their trace.

    With a token of AgentOps, each trace is a session, and becomes an attempt: of the rollout that it names, or of one
    of its own.
    """
    answer = ExportTraceServiceResponse()
    token = token_of(request.scope)
    project_id = None if token is None else token.project_id

    async def keep(message: Any, refused: Counter[str]) -> None:
        new, odd = await database.run(lambda: spans_of(message, lambda name: header(request.scope, name), project_id))
        refused[ODD_IDS] += odd
        refused += await _store(database, new, project_id)
        if token is not None and new:
            request.app.state.clients.has_sent(token.id)
        if refused:
            answer.partial_success.rejected_spans = refused.total()
            told = [f"{count} of the spans: {reason}" for reason, count in refused.most_common(REASONS_SHOWN)]
            answer.partial_success.error_message = "; ".join(told)

    return await _export(request, database, ExportTraceServiceRequest(), answer, keep)


async def _store(database: Transactions, new: list[NewSpan], project_id: str | None) -> Counter[str]:
    """Store spans; returns how many cannot be stored, by the reason."""
    try:
        await database.write(lambda connection: ingestion.ingest(connection, new, project_id))
        return Counter()
    except InvalidRecord:
        # Isolated in a second transaction, which keeps the usual one fast.
        _, refused = await database.write(
            lambda connection: insert_valid(
                connection, new, lambda some: ingestion.ingest(connection, some, project_id), database.explanation
            )
        )
        return Counter(str(error) for _, error in refused)


@routes.post("/logs", **_about("Logs", "resourceLogs", []))
async def logs(request: Request, database: Database) -> Response:
    """Accept logs, so that exporters do not report errors; they are not stored."""
    return await _export(request, database, ExportLogsServiceRequest(), ExportLogsServiceResponse())


@routes.post("/metrics", **_about("Metrics", "resourceMetrics", []))
async def metrics(request: Request, database: Database) -> Response:
    """Accept metrics, so that exporters do not report errors; they are not stored."""
    return await _export(request, database, ExportMetricsServiceRequest(), ExportMetricsServiceResponse())


async def _export(
    request: Request, database: Transactions, message: Message, answer: Message, keep: Any = None
) -> Response:
    content_type = media_type(request)
    if content_type not in (PROTOBUF, JSON):
        return sentence(415, f"OTLP has the content type {PROTOBUF} or {JSON}; this body has {shown(content_type)}")
    body = await request.body()
    try:
        refused = await database.run(lambda: parsed(message, body, content_type))
        if keep is not None:
            await keep(message, refused)
    except Unreadable as error:
        return sentence(400, str(error))
    return Response(written(answer, content_type), media_type=content_type)
