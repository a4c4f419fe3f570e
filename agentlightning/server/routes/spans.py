"""Routes of spans, as the LightningStore of Agent Lightning 0.3 has them. Times are seconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from agentlightning.server import schemas
from agentlightning.server.answers import Json, encode, listed
from agentlightning.server.decoding import repair_json, without_nan
from agentlightning.server.errors import sentence
from agentlightning.server.limits import NUMBER_LIMIT
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import Id, Logic, Page, Part, Sent, Whole, example
from agentlightning.store import ingestion, spans

__all__ = ["KeptSpan", "routes", "span_item"]

routes = router("spans", mend=lambda body: without_nan(repair_json(body)))

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Span"}}},
    }
}


class SpanContext(Sent):
    """Identity of a span."""

    model_config = ConfigDict(extra="allow")

    trace_id: str
    span_id: str
    is_remote: bool
    trace_state: dict[str, str]


class SpanStatus(Sent):
    """Outcome of a span."""

    model_config = ConfigDict(extra="allow")

    status_code: Literal["UNSET", "OK", "ERROR"]
    description: str | None = None


class Event(Sent):
    """An event within a span."""

    model_config = ConfigDict(extra="allow")

    name: str
    attributes: dict[str, Any]
    timestamp: float | None = None


class Link(Sent):
    """A link to another span."""

    model_config = ConfigDict(extra="allow")

    context: SpanContext
    attributes: dict[str, Any] | None = None


class SpanResource(Sent):
    """The process that sent a span."""

    model_config = ConfigDict(extra="allow")

    attributes: dict[str, Any]
    schema_url: str


class _Span(Sent):
    model_config = ConfigDict(extra="allow")

    trace_id: Id
    span_id: Id
    parent_id: Part | None
    name: str
    status: SpanStatus
    attributes: dict[str, Any]
    events: list[Event]
    links: list[Link]
    start_time: float | None
    end_time: float | None
    context: SpanContext | None
    parent: SpanContext | None
    resource: SpanResource


def _example_context(span_id: str) -> dict[str, Any]:
    return {"trace_id": "0123456789abcdef0123456789abcdef", "span_id": span_id, "is_remote": False, "trace_state": {}}


class Span(_Span):
    """A span of OpenTelemetry, with the rollout that it belongs to. Further fields are stored unchanged."""

    # Without nulls, which FastAPI drops from its document.
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "rollout_id": "ro-1",
                    "attempt_id": "at-1",
                    "sequence_id": 1,
                    "trace_id": "0123456789abcdef0123456789abcdef",
                    "span_id": "0123456789abcdef",
                    "parent_id": "fedcba9876543210",
                    "name": "chat",
                    "status": {"status_code": "OK"},
                    "attributes": {"gen_ai.response.id": "chatcmpl-1", "response_token_ids": [9707, 13]},
                    "events": [],
                    "links": [],
                    "start_time": 1796000000.0,
                    "end_time": 1796000001.5,
                    "context": _example_context("0123456789abcdef"),
                    "parent": _example_context("fedcba9876543210"),
                    "resource": {"attributes": {}, "schema_url": ""},
                }
            ]
        },
    )

    rollout_id: Id
    attempt_id: Id
    sequence_id: Whole | None = Field(
        ge=-NUMBER_LIMIT, le=NUMBER_LIMIT, description="Position among the spans of the rollout; null for the next."
    )


class KeptSpan(_Span):
    """A stored span. One that an exporter of OpenTelemetry sent may have no rollout, or an unknown one."""

    rollout_id: str | None
    attempt_id: str | None = Field(description="Empty where this store does not know the rollout.")
    sequence_id: int


class NextSequenceId(Sent):
    """The attempt that gets a span."""

    model_config = example(rollout_id="ro-1", attempt_id="at-1")

    rollout_id: Id
    attempt_id: Id


class SequenceId(BaseModel):
    """A sequence id that no other span of the rollout has."""

    sequence_id: int


class QuerySpans(schemas.Query):
    """Filters, order and page of spans: those of a rollout, or of a trace."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"rollout_id": "ro-1", "attempt_id": "latest"}],
            "anyOf": [
                {"required": [name], "properties": {name: {"type": "string"}}} for name in ("rollout_id", "trace_id")
            ],
        }
    )

    rollout_id: Part | None = Field(None, description="Required, unless trace_id is given.")
    attempt_id: Part | None = Field(None, description="`latest` for the latest.")
    trace_id: Part | None = None
    trace_id_contains: Part | None = None
    span_id: Part | None = None
    span_id_contains: Part | None = None
    parent_id: Part | None = None
    parent_id_contains: Part | None = None
    name: Part | None = None
    name_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal[
            "rollout_id",
            "attempt_id",
            "sequence_id",
            "trace_id",
            "span_id",
            "parent_id",
            "name",
            "start_time",
            "end_time",
        ]
        | None
    ) = "sequence_id"


def span_item(row: Any) -> msgspec.Raw:
    """Return a span as JSON."""
    return msgspec.Raw(spans.span_json(row))


@routes.post("/spans", status_code=201, response_model=Span | None, responses=errors(404), openapi_extra=BODY)
async def add_span(request: Request, database: Database) -> Response:
    """Store a span of an attempt, which is a sign of life of the attempt; null where it was stored before."""
    sent = await request.json()
    # Validated, but stored as it was sent: it may hold thousands of token ids.
    checked = Span.model_validate(sent)
    new = spans.new_span({**sent, "sequence_id": checked.sequence_id}, encode)
    new.start_time, new.end_time = checked.start_time, checked.end_time
    stored = await database.write_together(ingestion.add_spans, new)
    return Json(None if stored is None else span_item(stored), 201)


@routes.get("/spans", response_model=Page[KeptSpan], responses=errors())
async def query_spans(wanted: Annotated[QuerySpans, Query()], database: Database) -> Response:
    """Find the spans of a rollout, or of a trace, including those that arrived without a rollout."""
    return await _listed(wanted, database)


@routes.post("/spans/search", response_model=Page[KeptSpan], responses=errors())
async def search_spans(wanted: QuerySpans, database: Database) -> Response:
    """Find the spans of a rollout, or of a trace, including those that arrived without a rollout."""
    return await _listed(wanted, database)


@routes.post("/spans/next", response_model=SequenceId, responses=errors())
async def get_next_sequence_id(wanted: NextSequenceId, database: Database) -> Response:
    """Reserve a sequence id for a span, higher than those of all stored spans of the rollout."""
    [number] = await database.write(lambda connection: spans.next_sequence_ids(connection, wanted.rollout_id))
    return Json({"sequence_id": number})


async def _listed(wanted: QuerySpans, database: Database) -> Response:
    if wanted.rollout_id is None and wanted.trace_id is None:
        return sentence(422, "rollout_id: is required, unless trace_id is given")
    filters = wanted.model_dump(exclude={"limit", "offset", "sort_by", "sort_order"})
    return await listed(database, spans.listing(**filters), wanted, span_item)
