"""What the AgentOps SDK (0.4) sends, and reads."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from agentlightning.server.schemas import Sent, example

__all__ = ["Bearer", "Key", "Login", "Metrics", "Span", "Trace", "Upload", "Uploaded"]


class Key(Sent):
    """Who wants a token."""

    model_config = example(api_key="the key of this store")

    api_key: str = Field(min_length=1, max_length=4096)


class Login(BaseModel):
    """A token."""

    token: str
    project_id: str
    project_prem_status: str


class Bearer(BaseModel):
    """A token, as the validation of the SDK asks for it."""

    bearer: str


class Upload(Sent):
    """What an agent has printed, or an object."""

    model_config = example(body="2026-11-24 10:30:00,000 - INFO - hello")

    body: str


class Uploaded(BaseModel):
    """Where it is."""

    url: str
    size: int = Field(description="Bytes.")


class Span(BaseModel):
    """A span. Durations are milliseconds, and moments are in UTC, as ISO 8601 has them."""

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
    spans: list[Span]


class Metrics(BaseModel):
    """How many tokens a trace took: those that vLLM has recorded, and where it has not, what the spans say."""

    total_tokens: int
    prompt_tokens: int
    completion_tokens: int
    total_cost: str
