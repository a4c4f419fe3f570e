"""Spans, as the LightningStore interface of Agent Lightning 0.3 has them. Moments are seconds since the epoch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentlightning.server.limits import NUMBER_LIMIT
from agentlightning.server.models.common import Id, Logic, Part, Query, Sent, Whole, example

__all__ = ["KeptSpan", "NextSequenceId", "QuerySpans", "SequenceId", "Span"]


class SpanContext(Sent):
    """Which span it is."""

    model_config = ConfigDict(extra="allow")

    trace_id: str
    span_id: str
    is_remote: bool
    trace_state: dict[str, str]


class SpanStatus(Sent):
    """How a span has ended."""

    model_config = ConfigDict(extra="allow")

    status_code: Literal["UNSET", "OK", "ERROR"]
    description: str | None = None


class Event(Sent):
    """Something that happened in a span."""

    model_config = ConfigDict(extra="allow")

    name: str
    attributes: dict[str, Any]
    timestamp: float | None = None


class Link(Sent):
    """Another span that this one has to do with."""

    model_config = ConfigDict(extra="allow")

    context: SpanContext
    attributes: dict[str, Any] | None = None


class SpanResource(Sent):
    """What has sent a span."""

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
    """A span of OpenTelemetry, with the rollout that it belongs to. Fields that are not here are kept as they are."""

    # Without nulls, which FastAPI leaves out of its document.
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
    sequence_id: Whole = Field(ge=-NUMBER_LIMIT, le=NUMBER_LIMIT, description="Its place among the rollout's spans.")


class KeptSpan(_Span):
    """A span that was found. Those that exporters of OpenTelemetry have sent may have no rollout, or an unknown one."""

    rollout_id: str | None
    attempt_id: str | None = Field(description="Empty where nobody has made the rollout.")
    sequence_id: int


class NextSequenceId(Sent):
    """Whose span is to be numbered."""

    model_config = example(rollout_id="ro-1", attempt_id="at-1")

    rollout_id: Id
    attempt_id: Id


class SequenceId(BaseModel):
    """A number for a span that no other of the rollout has."""

    sequence_id: int


class QuerySpans(Query):
    """Which spans: those of a rollout, or of a trace."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"rollout_id": "ro-1", "attempt_id": "latest"}],
            "anyOf": [
                {"required": [name], "properties": {name: {"type": "string"}}} for name in ("rollout_id", "trace_id")
            ],
        }
    )

    rollout_id: Part | None = Field(None, description="May only be missing where trace_id is there.")
    attempt_id: Part | None = Field(None, description="`latest` is the latest.")
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
