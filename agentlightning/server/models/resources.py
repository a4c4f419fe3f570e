"""Resources, as the LightningStore interface of Agent Lightning 0.3 has them. Moments are seconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentlightning.server.models.common import Part, Query, Sent

__all__ = ["NamedResources", "QueryResources", "ResourcesUpdate"]


class Llm(Sent):
    """A model that is served."""

    model_config = ConfigDict(extra="allow")

    resource_type: Literal["llm", "proxy_llm"]
    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field({})


class PromptTemplate(Sent):
    """A prompt with gaps."""

    model_config = ConfigDict(extra="allow")

    resource_type: Literal["prompt_template"]
    template: str
    engine: Literal["jinja", "f-string", "poml"]


NamedResources = Annotated[
    dict[str, Annotated[Llm | PromptTemplate, Field(discriminator="resource_type")]],
    Field(
        examples=[
            {
                "main": {"resource_type": "llm", "endpoint": "http://127.0.0.1:8000/v1", "model": "Qwen/Qwen3-0.6B"},
                "prompt": {"resource_type": "prompt_template", "template": "{question}", "engine": "f-string"},
            }
        ]
    ),
]


class ResourcesUpdate(BaseModel):
    """Resources, and which version of them it is."""

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: NamedResources


class QueryResources(Query):
    """Which resources."""

    resources_id: Part | None = None
    resources_id_contains: Part | None = None
    sort_by: Literal["resources_id", "create_time", "update_time", "version", "resources"] | None = None
