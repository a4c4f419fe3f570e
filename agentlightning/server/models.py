"""What is sent and answered, as the LightningStore interface of Agent Lightning 0.3 has it. Moments are seconds since
the epoch. Of an answer these describe what there is; it is written by `answers.py`, without making one of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints, field_validator

from agentlightning.generation import Status
from agentlightning.server.limits import BATCH_LIMIT, DEQUEUE_LIMIT, ID_LIMIT, NUMBER_LIMIT, PAGE_LIMIT
from agentlightning.store.rollouts import AttemptStatus, Config, Mode, RolloutStatus
from agentlightning.store.workers import WorkerStatus

__all__ = [
    "Attempt",
    "AttemptedRollout",
    "ChangeAttempt",
    "ChangeRollout",
    "ChangeWorker",
    "Dequeue",
    "Enqueue",
    "Health",
    "Id",
    "KeptSpan",
    "NamedResources",
    "NewRollout",
    "NextSequenceId",
    "Page",
    "Query",
    "QueryAttempts",
    "QueryResources",
    "QueryRollouts",
    "QuerySpans",
    "QueryWorkers",
    "ResourcesUpdate",
    "Reward",
    "Rollout",
    "SequenceId",
    "Span",
    "StartAttempt",
    "StartRollout",
    "Statistics",
    "Triplet",
    "Triplets",
    "WaitForRollouts",
    "Worker",
]

# Not every database has a NUL in a text.
_WITHOUT_NUL = r"^[^\x00]*$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=ID_LIMIT, pattern=_WITHOUT_NUL)]
Part = Annotated[str, StringConstraints(max_length=ID_LIMIT, pattern=_WITHOUT_NUL)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
# To JSON 1.0 is the same number as 1.
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
Order = Literal["asc", "desc"]
Logic = Literal["and", "or"]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


def _without_default(schema: dict[str, JsonValue]) -> None:
    del schema["default"]


# Of what stays as it is where it is left out: its default is never looked at, and null is no value of it.
_LEFT_OUT: Any = Field(None, json_schema_extra=_without_default)


class Sent(BaseModel):
    """What comes as JSON, where `true` and `"1"` are no numbers."""

    model_config = ConfigDict(strict=True)


class RolloutConfig(Sent):
    """When an attempt is given up, and when another is made."""

    model_config = _example(
        timeout_seconds=600.0, unresponsive_seconds=60.0, max_attempts=3, retry_condition=["timeout"]
    )

    timeout_seconds: Seconds | None = Field(None, description="How long an attempt may take; null is for ever.")
    unresponsive_seconds: Seconds | None = Field(None, description="How long an attempt may be without a sign of life.")
    max_attempts: Whole = Field(
        1, ge=1, le=2**31 - 1, description="How many attempts there may be, the first included."
    )
    retry_condition: list[AttemptStatus] = Field([], max_length=64, description="Ends that are tried again after.")

    def as_config(self) -> Config:
        return Config(**self.model_dump())


class NewRollout(Sent):
    """A rollout that is to be made."""

    model_config = _example(input={"question": "What is 6 x 7?"}, mode="train", metadata={"split": 1})

    input: Any = Field(description="The task: any JSON.")
    mode: Mode | None = None
    resources_id: Id | None = Field(None, description="Null is the latest resources.")
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None


class StartRollout(NewRollout):
    """A rollout that is run at once, by the worker that asks."""

    worker_id: Id | None = None


class Enqueue(Sent):
    """Rollouts for the queue, in this order."""

    model_config = _example(rollouts=[{"input": {"question": "What is 6 x 7?"}, "mode": "train"}])

    rollouts: list[NewRollout] = Field(max_length=BATCH_LIMIT)


class Dequeue(Sent):
    """How many rollouts a worker takes."""

    model_config = _example(limit=1, worker_id="runner-1")

    limit: Whole = Field(1, description=f"At most {DEQUEUE_LIMIT} are taken at once, however many are asked for.")
    worker_id: Id | None = None


class ChangeRollout(Sent):
    """What is to be set of a rollout; what is not there stays."""

    model_config = _example(status="cancelled")

    input: Any = _LEFT_OUT
    mode: Mode | None = None
    resources_id: Id | None = None
    status: RolloutStatus = _LEFT_OUT
    config: RolloutConfig = _LEFT_OUT
    metadata: dict[str, Any] | None = None


class StartAttempt(Sent):
    """Who makes the attempt."""

    model_config = _example(worker_id="runner-1")

    worker_id: Id | None = None


class ChangeAttempt(Sent):
    """What is to be set of an attempt; what is not there stays."""

    model_config = _example(status="succeeded")

    status: AttemptStatus = _LEFT_OUT
    worker_id: Id = _LEFT_OUT
    last_heartbeat_time: Seconds = _LEFT_OUT
    metadata: dict[str, Any] = _LEFT_OUT


class ChangeWorker(Sent):
    """A worker's sign of life."""

    model_config = _example(heartbeat_stats={"cpu_percent": 12.5})

    heartbeat_stats: dict[str, Any] = _LEFT_OUT


class Attempt(BaseModel):
    """One try at a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int = Field(description="1 for the first.")
    start_time: float
    end_time: float | None
    status: AttemptStatus
    worker_id: str | None
    last_heartbeat_time: float | None
    metadata: dict[str, Any] | None


class Rollout(BaseModel):
    """A task and what has become of it."""

    rollout_id: str
    input: Any
    start_time: float
    end_time: float | None
    mode: Mode | None
    resources_id: str | None
    status: RolloutStatus
    config: RolloutConfig
    metadata: dict[str, Any] | None


class AttemptedRollout(Rollout):
    """A rollout with its latest attempt."""

    attempt: Attempt


class Worker(BaseModel):
    """A runner, and what was heard of it last."""

    worker_id: str
    status: WorkerStatus
    heartbeat_stats: dict[str, Any] | None
    last_heartbeat_time: float | None
    last_dequeue_time: float | None
    last_busy_time: float | None
    last_idle_time: float | None
    current_rollout_id: str | None
    current_attempt_id: str | None


class Llm(Sent):
    """A model that is served."""

    model_config = ConfigDict(extra="allow")

    resource_type: Literal["llm", "proxy_llm"]
    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = {}


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
    parent_id: Id | None
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
    sequence_id: Whole = Field(ge=0, le=NUMBER_LIMIT, description="Its place among the rollout's spans.")


class KeptSpan(_Span):
    """A span that was found. Those that exporters of OpenTelemetry have sent may have no rollout, or an unknown one."""

    rollout_id: str | None
    attempt_id: str | None = Field(description="Empty where nobody has made the rollout.")
    sequence_id: int


class Reward(Sent):
    """What an attempt, or a call of it, was worth."""

    model_config = _example(value=1.0)

    value: float = Field(allow_inf_nan=False)
    generation_id: Id | None = Field(
        None, description="Which call it belongs to; null is the last of the attempt, whichever that is when asked for."
    )


class WeightVersion(BaseModel):
    """The weights that some ids were sampled with."""

    version: str
    start: int = Field(description="The place of the first of them in `response_token_ids`.")
    end: int = Field(description="The place after the last.")


class Triplet(BaseModel):
    """A choice of a model call of a rollout: what went in, what came out, and the reward."""

    generation_id: str
    response_id: str | None = Field(description="The `id` of the answer that the client saw.")
    rollout_id: str
    attempt_id: str | None
    index: int = Field(description="The choice's place among those of the generation.")
    status: Status
    model: str | None
    prompt_token_ids: list[int] | None
    response_token_ids: list[int] | None
    logprobs: list[float | None] | None = Field(description="Of each of the response's ids; null is minus infinity.")
    reward: float | None
    span_id: str | None = Field(description="The first span of the rollout that names the answer.")
    weight_versions: list[WeightVersion] | None


class Triplets(BaseModel):
    """Those of a rollout, in order."""

    items: list[Triplet]


class NextSequenceId(Sent):
    """Whose span is to be numbered."""

    model_config = _example(rollout_id="ro-1", attempt_id="at-1")

    rollout_id: Id
    attempt_id: Id


class SequenceId(BaseModel):
    """A number for a span that no other of the rollout has."""

    sequence_id: int


class WaitForRollouts(Sent):
    """Rollouts that somebody waits for."""

    model_config = _example(rollout_ids=["ro-1"], timeout=5.0)

    rollout_ids: list[Id] = Field(max_length=BATCH_LIMIT)
    timeout: float | None = Field(None, description="Seconds; null is until all have ended.")


class Statistics(BaseModel):
    """How much there is."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    total_workers: int
    total_generations: int
    uptime: float = Field(description="Seconds.")


class Health(BaseModel):
    """That the server works."""

    status: Literal["ok"]


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Some of what was found."""

    items: list[Item]
    limit: int
    offset: int
    total: int = Field(description="How many there are on all pages.")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


class Query(BaseModel):
    """Which page, in which order."""

    # In a URL everything is text, so that these cannot be as strict as what is sent as JSON.
    limit: Annotated[int, BeforeValidator(_number)] = Field(
        -1, ge=-1, le=PAGE_LIMIT, description="-1 is all.", json_schema_extra={"not": {"const": 0}}
    )
    offset: Annotated[int, BeforeValidator(_number)] = Field(0, ge=0, le=NUMBER_LIMIT)
    sort_order: Order = "asc"

    @field_validator("limit")
    @classmethod
    def _not_nothing(cls, limit: int) -> int:
        if limit == 0:
            raise ValueError(f"must be from 1 to {PAGE_LIMIT}, or -1 for all")
        return limit


class QueryRollouts(Query):
    """Which rollouts."""

    model_config = _example(status_in=["queuing", "running"], limit=100)

    status_in: list[RolloutStatus] | None = None
    rollout_id_in: list[Part] | None = Field(None, max_length=BATCH_LIMIT)
    rollout_id_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal["rollout_id", "input", "start_time", "end_time", "mode", "resources_id", "status", "config", "metadata"]
        | None
    ) = None


class QueryAttempts(Query):
    """Which attempts of a rollout."""

    model_config = _example(sort_by="start_time", sort_order="desc")

    sort_by: (
        Literal[
            "attempt_id",
            "sequence_id",
            "start_time",
            "end_time",
            "status",
            "worker_id",
            "last_heartbeat_time",
            "metadata",
        ]
        | None
    ) = "sequence_id"


class QueryResources(Query):
    """Which resources."""

    resources_id: Part | None = None
    resources_id_contains: Part | None = None
    sort_by: Literal["resources_id", "create_time", "update_time", "version", "resources"] | None = None


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


class QueryWorkers(Query):
    """Which workers."""

    model_config = _example(status_in=["busy"])

    status_in: list[WorkerStatus] | None = None
    worker_id_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal[
            "worker_id",
            "status",
            "heartbeat_stats",
            "last_heartbeat_time",
            "last_dequeue_time",
            "last_busy_time",
            "last_idle_time",
            "current_rollout_id",
            "current_attempt_id",
        ]
        | None
    ) = None
