"""Routes of triplets: the model calls of a rollout, token by token, with their rewards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from agentlightning import triplet
from agentlightning.generation import Status
from agentlightning.server.answers import Json, encode
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.routes.lines import JSON_LINES, RolloutPage, lines_of_rollouts, wants_lines
from agentlightning.server.routes.spans import KeptSpan, span_item
from agentlightning.server.schemas import CallerFilters, Id, Nanoseconds, NullableFilters, Sent, example
from agentlightning.server.transactions import Transactions
from agentlightning.store import completeness, ingestion, triplets
from agentlightning.store.filters import TripletFilters, nullable

__all__ = ["items", "routes", "triplet_lines"]

COMPLETE_HEADER = "X-AGL-Complete"
"""A header of a rollout's triplets as JSON Lines, which have no other place for it."""

routes = router("triplets")


class Reward(Sent):
    """The reward of an attempt, or of one of its calls."""

    model_config = example(value=1.0)

    value: float = Field(allow_inf_nan=False)
    generation_id: Id | None = Field(
        None,
        description="The rewarded call; null for the attempt's last call, whichever that is when triplets are read.",
    )


class SomeTriplets(NullableFilters[Literal[nullable(TripletFilters)]], CallerFilters):
    """Filters of triplets: those that match all of them."""

    status: Status | None = Field(None, description="Only those of generations with this status.")
    min_reward: float | None = Field(None, allow_inf_nan=False, description="Only those with at least this reward.")
    weight_version: str | None = Field(
        None, description="Only those of which every sampled id is known to be of this version of the weights."
    )
    since: Nanoseconds | None = Field(None, description="Only those of calls that finished at this time or later.")

    def filters(self) -> TripletFilters:
        """Return the filters of the store."""
        return self.given(TripletFilters)


class QueryTriplets(SomeTriplets, RolloutPage):
    """Filters of triplets, and which rollouts to read; all without filters."""


class WeightVersion(BaseModel):
    """The weights with which some ids were sampled."""

    version: str
    start: int = Field(description="Position of the first of these ids in `response_token_ids`.")
    end: int = Field(description="Position after the last one.")


class Triplet(BaseModel):
    """A choice of a model call of a rollout: prompt ids, response ids, and the reward."""

    generation_id: str
    response_id: str | None = Field(description="The `id` of the answer that the client saw.")
    rollout_id: str
    attempt_id: str | None
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    index: int = Field(description="Position of the choice in its generation.")
    status: Status
    finish_reason: str | None = Field(description="vLLM's word for why the answer ended: `stop`, `length`, ...")
    model: str | None
    prompt_token_ids: list[int] | None
    response_token_ids: list[int] | None
    logprobs: list[float | None] | None = Field(description="One for each response id; null stands for minus infinity.")
    reward: float | None
    span_id: str | None = Field(description="The first span of the rollout that names the answer.")
    weight_versions: list[WeightVersion] | None
    routed_experts: list[list[list[int]]] | None = Field(
        description="Of each id of prompt and response; -1 where vLLM gave none."
    )
    sampling_mask: list[list[int]] | None = Field(description="The ids that each response id was chosen from.")
    input: Any = Field(description="The rollout's; null if it was only recorded.")
    metadata: dict[str, Any] | None = Field(description="The rollout's; null if it was only recorded.")


class Shortfall(BaseModel):
    """A process that records, and what it has not stored. What does not apply is null."""

    sender_id: str
    host: str
    pid: int
    calls: int | None = Field(description="Number of generations.")
    seconds: float | None = Field(description="How far it is behind the rollout's end, or how long it has been silent.")
    reason: str | None = Field(description="Why calls are lost.")


class Completeness(BaseModel):
    """The state of a rollout, or of an attempt: whether it has ended and all of its calls are stored, or why not."""

    complete: bool = Field(description="True if it has ended and nothing below is missing.")
    status: str | None = Field(description="Null where the queue does not have it, so that its end is unknown.")
    ended: bool
    under_way: list[Shortfall] = Field(description="Calls of it that a server has begun and not ended.")
    behind: list[Shortfall] = Field(description="Servers that may still have calls of it in their queues.")
    silent: list[Shortfall] = Field(
        description="Servers that ended or were cut off without a word while it ran: calls of it may be lost."
    )
    lost: list[Shortfall] = Field(
        description="Calls of it that a server could not store, or had under way when it fell silent."
    )
    unrecorded: list[str] = Field(description="Answers that a span of it names and no recorded call has.")


class Triplets(Completeness):
    """The triplets of a rollout, in order, and whether all are there."""

    items: list[Triplet]


def _answers(**content: Any) -> dict[int | str, dict[str, Any]]:
    """Describe an answer that is JSON Lines, or may be, for the OpenAPI document."""
    lines = {JSON_LINES: {"schema": {"type": "string", "description": "A Triplet a line."}}}
    return {200: {"description": "Triplets.", "content": {**lines, **content}}, **errors()}


@routes.get("/triplets", response_class=Response, responses={**_answers(), **errors(404)})
async def query_triplets(wanted: Annotated[QueryTriplets, Query()], database: Database) -> Response:
    """Read the triplets of all rollouts, one rollout after the other, or of one, as JSON Lines."""
    filters = wanted.filters()

    async def lines(rollout_id: str) -> bytes:
        return await triplet_lines(database, rollout_id, wanted.attempt_id, filters)

    return await lines_of_rollouts(database, wanted, lines)


async def triplet_lines(
    database: Transactions, rollout_id: str, attempt_id: str | None = None, filters: TripletFilters | None = None
) -> bytes:
    """Read the triplets of a rollout, a line each."""
    return await database.read(
        lambda connection: _lines(triplets.of_rollout(connection, rollout_id, attempt_id, filters or {}))
    )


class QueryCompleteness(BaseModel):
    """The rollout, and maybe one of its attempts."""

    model_config = ConfigDict(extra="forbid")

    rollout_id: Id
    attempt_id: Id | None = None


@routes.get("/completeness", response_model=Completeness, responses=errors())
async def get_completeness(wanted: Annotated[QueryCompleteness, Query()], database: Database) -> Response:
    """Tell whether a rollout, or an attempt, has ended and all of its calls are stored, or why not."""
    found = await database.read(
        lambda connection: completeness.of_rollout(connection, wanted.rollout_id, wanted.attempt_id)
    )
    return Json(found.as_dict())


@routes.get("/rollouts/{rollout_id}/triplets", response_model=Triplets, responses=_answers())
async def get_triplets(
    rollout_id: Id, wanted: Annotated[SomeTriplets, Query()], request: Request, database: Database
) -> Response:
    """Read the triplets of a rollout, in order, and whether all are there; as JSON Lines for `application/jsonl`."""
    return await _answer(request, database, rollout_id, None, wanted)


@routes.get("/rollouts/{rollout_id}/attempts/{attempt_id}/triplets", response_model=Triplets, responses=_answers())
async def get_triplets_of_attempt(
    rollout_id: Id, attempt_id: Id, wanted: Annotated[SomeTriplets, Query()], request: Request, database: Database
) -> Response:
    """Read the triplets of an attempt, `latest` or of this id, in order, and whether all are there."""
    return await _answer(request, database, rollout_id, attempt_id, wanted)


@routes.post(
    "/rollouts/{rollout_id}/attempts/{attempt_id}/reward",
    status_code=201,
    response_model=KeptSpan,
    responses=errors(404),
)
async def add_reward(rollout_id: Id, attempt_id: Id, body: Reward, database: Database) -> Response:
    """Reward an attempt, `latest` or of this id, or one of its calls. Of several rewards the last counts.

    The rollout may have been created here, or only recorded.
    """
    return await _reward(rollout_id, attempt_id, body, database)


@routes.post("/rollouts/{rollout_id}/reward", status_code=201, response_model=KeptSpan, responses=errors(404))
async def add_reward_of_rollout(rollout_id: Id, body: Reward, database: Database) -> Response:
    """Reward the latest attempt of a rollout, or one of its calls."""
    return await _reward(rollout_id, "latest", body, database)


async def _reward(rollout_id: str, attempt_id: str, body: Reward, database: Transactions) -> Response:
    def work(connection: Connection) -> Any:
        return ingestion.add_reward(connection, rollout_id, attempt_id, body.value, body.generation_id)

    return Json(span_item(await database.write(work)), 201)


async def _answer(
    request: Request, database: Transactions, rollout_id: str, attempt_id: str | None, wanted: SomeTriplets
) -> Response:
    as_lines, filters = wants_lines(request), wanted.filters()

    def work(connection: Connection) -> tuple[bytes, bool]:
        found = triplets.of_rollout(connection, rollout_id, attempt_id, filters)
        told = completeness.of_rollout(connection, rollout_id, attempt_id)
        return _lines(found) if as_lines else items(found, **told.as_dict()), told.complete

    answer, is_complete = await database.read(work)
    if not as_lines:
        return Json(answer)
    return Response(answer, media_type=JSON_LINES, headers={COMPLETE_HEADER: "true" if is_complete else "false"})


def items(found: Iterable[triplet.Triplet], **more: Any) -> bytes:
    """Encode triplets as JSON, one by one: all of their numbers at once do not fit a CPU's cache (half as fast)."""
    return encode({"items": [msgspec.Raw(encode(each.as_dict())) for each in found], **more})


def _lines(found: Iterable[triplet.Triplet]) -> bytes:
    return b"".join(encode(each.as_dict()) + b"\n" for each in found)
