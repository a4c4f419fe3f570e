"""What is asked and answered about generations. Moments are nanoseconds since the epoch, as vLLM servers have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentlightning.generation import Status
from agentlightning.store import Filters
from agentlightning.store.generations import Place

__all__ = [
    "Added",
    "Generation",
    "GenerationFilters",
    "GenerationPage",
    "GenerationQuery",
    "Losses",
    "Tally",
    "cursor_of",
]

Nanoseconds = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class GenerationFilters(BaseModel):
    """Which generations: those that all of these hold for."""

    # A filter that there is not would let everything through.
    model_config = ConfigDict(extra="forbid")

    rollout_id: str | None = None
    attempt_id: str | None = None
    session_id: str | None = None
    call_id: str | None = None
    response_id: str | None = None
    model: str | None = None
    status: Status | None = None
    since: Nanoseconds | None = Field(None, description="Only those that finished then or later.")
    until: Nanoseconds | None = Field(None, description="Only those that finished before.")
    without: list[Literal["rollout_id", "attempt_id", "session_id", "call_id", "response_id", "model"]] = Field(
        [], description="Only those that have none of these."
    )

    @model_validator(mode="after")
    def _not_with_and_without(self) -> GenerationFilters:
        if both := [name for name in self.without if getattr(self, name) is not None]:
            raise ValueError(f"{both[0]} is asked for, and to be missing")
        return self

    def filters(self) -> Filters:
        """As the store has them."""
        given = {name: value for name in Filters.__annotations__ if (value := getattr(self, name)) is not None}
        filters: Any = given | dict.fromkeys(self.without)
        return filters


class GenerationQuery(GenerationFilters):
    """Which generations, from where on."""

    limit: int = Field(100, ge=1, le=1000)
    # Each of these stands for a place: there is none that is wrong.
    cursor: str | None = Field(
        None, pattern="^[0-9a-f]{16}[0-7][0-9a-f]{15}$", description="`next` of the page before."
    )

    def after(self) -> Place | None:
        """Where the page before ended; None for the first."""
        if self.cursor is None:
            return None
        return Place(int(self.cursor[:16], 16) - 2**63, int(self.cursor[16:], 16))


def cursor_of(place: Place | None) -> str | None:
    """What a client asks with for the page that comes after."""
    return None if place is None else f"{place.finished_at + 2**63:016x}{place.key:016x}"


class Choice(BaseModel):
    """One of the answers to a prompt."""

    index: int
    token_ids: list[int] | None
    logprobs: list[float | None] | None = Field(description="An infinite one is null: JSON has none.")
    text: str | None
    finish_reason: str | None
    stop_reason: int | str | None
    weight_versions: list[tuple[str, int, int]] | None
    routed_experts: list[list[list[int]]] | None


class Generation(BaseModel):
    """One request to the engine. What is unknown is null."""

    id: str
    call_id: str | None
    request_id: str
    response_id: str | None
    endpoint: str | None
    model: str | None
    rollout_id: str | None
    attempt_id: str | None
    session_id: str | None
    trace_id: str | None
    started_at: int | None
    first_token_at: int | None
    finished_at: int
    status: Status
    prompt_token_ids: list[int] | None
    prompt_text: str | None
    sampling_params: str | None
    logprobs_mode: str | None
    cached_tokens: int | None
    choices: list[Choice]


class GenerationPage(BaseModel):
    """Some of what was found, in the order in which they finished."""

    items: list[Generation]
    next: str | None = Field(description="The cursor of the page after this one; null where there is none.")


class Refused(BaseModel):
    """A generation that no store can keep."""

    id: str
    reason: str


class Added(BaseModel):
    """What became of generations that were sent: all that were not refused are kept."""

    new: int = Field(description="How many were not known yet.")
    refused: list[Refused]
    sender: Literal["known", "unknown"] | None = Field(
        None, description="Left out where the message names none. One that is unknown is to say who it is."
    )


class Tally(BaseModel):
    """How many there are, by status."""

    finished: int
    aborted: int
    error: int


class Loss(BaseModel):
    """Generations that could not be kept."""

    id: str
    count: int
    reason: str
    first_at: int
    last_at: int
    host: str
    pid: int


class Losses(BaseModel):
    """What could not be kept, in the order in which it was written down."""

    items: list[Loss]
