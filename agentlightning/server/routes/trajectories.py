"""Routes of trajectories: the calls of a rollout, merged into the rows that trainers take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import HTTPException, Query, Request, Response
from pydantic import BaseModel, Field

from agentlightning import trajectory
from agentlightning.generation import Status
from agentlightning.server.answers import Json, encode
from agentlightning.server.limits import NUMBER_LIMIT
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.routes.lines import JSON_LINES, RolloutPage, lines_of_rollouts, wants_lines
from agentlightning.server.schemas import CallerFilters, Id, NullableFilters
from agentlightning.server.transactions import Transactions
from agentlightning.store import trajectories
from agentlightning.store.filters import TrajectoryOptions, nullable
from agentlightning.trajectory import Drift, Flag, Reason

__all__ = ["routes", "trajectory_lines"]

routes = router("trajectories")

Count = Annotated[int, Field(ge=0, le=NUMBER_LIMIT)]


class TrajectoryQuery(NullableFilters[Literal[nullable(trajectory.MergeOptions)]], CallerFilters):
    """Options: how calls become rows, and which rows to select."""

    drift: Drift = Field("fork", description="What becomes of a prompt that breaks the context it should extend.")
    drift_limit: Count = Field(trajectory.DRIFT_LIMIT, description="Most ids that `realign` overwrites.")
    status: Status | None = Field(None, description="Only rows whose calls all have this status.")
    model: str | None = Field(None, description="Only rows of this model.")
    min_reward: float | None = Field(None, allow_inf_nan=False, description="Only rows with at least this reward.")
    weight_version: str | None = Field(
        None, description="Only rows of which every sampled id is known to be of this version of the weights."
    )
    max_staleness: Count | None = Field(
        None, description="Integer versions that are up to so many smaller than `weight_version` count, too."
    )
    complete: bool = Field(False, description="Only rows that are not aborted, truncated or cut, and miss no call.")
    max_length: Count | None = Field(None, description="Most ids of a row; what is behind is cut off.")
    max_prompt_length: Count | None = Field(None, description="Rows with a longer prompt are left out.")
    max_response_length: Count | None = Field(
        None, description="Most ids from `prompt_length` on; what is behind is cut off."
    )

    def options(self) -> TrajectoryOptions:
        """Return the options of the store."""
        given = self.given(trajectory.MergeOptions)
        try:
            trajectory.check_options(given)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return given


class QueryTrajectories(TrajectoryQuery, RolloutPage):
    """Filters of rollouts, the way in which their calls become rows, and filters of rows."""


class Parent(BaseModel):
    """The row that a row branched from."""

    index: int
    position: int = Field(description="Where both go apart: all ids before it are those of both rows.")


class Answer(BaseModel):
    """An answer in a row."""

    generation_id: str
    index: int = Field(description="Position of the choice in its generation.")
    start: int = Field(description="Position of its first id in `token_ids`.")
    end: int = Field(description="Position after its last one.")
    is_trained: bool = Field(description="Whether it is trained in this row; otherwise it is in another row, too.")
    status: Status
    finish_reason: str | None
    reward: float | None
    logprobs_mode: str | None
    sampling: dict[str, Any] | None


class Reward(BaseModel):
    """The reward of a trained answer."""

    position: int = Field(description="Position of its last id in `token_ids`.")
    reward: float


class WeightVersion(BaseModel):
    """The weights with which some ids were sampled."""

    version: str
    start: int = Field(description="Position of the first of these ids in `token_ids`.")
    end: int = Field(description="Position after the last one.")


class LeftOut(BaseModel):
    """A call that is in no row."""

    generation_id: str
    index: int
    reason: Reason
    reward: float | None


class Trajectory(BaseModel):
    """A sequence of ids with a mask, made of one call or more of an attempt."""

    rollout_id: str
    attempt_id: str | None
    index: int = Field(description="Position of the row among those of the attempt.")
    count: int = Field(description="Number of rows of the attempt.")
    parent: Parent | None
    token_ids: list[int]
    response_mask: list[int] = Field(description="1 for each id that was sampled and is trained in this row, else 0.")
    logprobs: list[float | None] | None = Field(
        description="One for each id; 0.0 where the mask is 0. Null stands for minus infinity."
    )
    prompt_length: int = Field(description="Number of ids before the first sampled one.")
    spans: list[Answer]
    reward: float | None = Field(description="The attempt's final reward.")
    rewards: list[Reward]
    model: str | None
    agent_id: str | None = Field(description="The agent of its calls.")
    parent_agent_id: str | None
    purpose: str | None = Field(description="That of all calls; null where they differ, or one is unknown.")
    weight_versions: list[WeightVersion] | None
    routed_experts: list[list[list[int]]] | None = Field(description="Of each id; -1 where no call gave them.")
    missing_experts: int | None = Field(description="Number of ids that no call gave experts of.")
    sampling_mask: list[list[int]] | None = Field(description="The ids that each trained id was chosen from.")
    logprobs_mode: str | None
    temperature: float | None
    flags: list[Flag] = Field(description="Why the row is to be looked at twice.")
    left_out: list[LeftOut] = Field(
        description="Calls of the attempt that are in no row; the first of its rows that are returned has them."
    )
    input: Any = Field(description="The rollout's; null if it was only recorded.")
    metadata: dict[str, Any] | None = Field(description="The rollout's; null if it was only recorded.")
    group: str | None = Field(description="Equal for all rollouts of one task.")


class Trajectories(BaseModel):
    """The trajectories of a rollout, in order."""

    items: list[Trajectory]
    left_out: list[LeftOut] = Field(description="Calls that are in no row, also those of attempts without any row.")


def _answers(**content: Any) -> dict[int | str, dict[str, Any]]:
    lines = {JSON_LINES: {"schema": {"type": "string", "description": "A Trajectory a line."}}}
    return {200: {"description": "Trajectories.", "content": {**lines, **content}}, **errors()}


@routes.get("/trajectories", response_class=Response, responses={**_answers(), **errors(404)})
async def query_trajectories(wanted: Annotated[QueryTrajectories, Query()], database: Database) -> Response:
    """Read the trajectories of all rollouts, one rollout after the other, or of one, as JSON Lines."""
    options = wanted.options()

    async def lines(rollout_id: str) -> bytes:
        return await trajectory_lines(database, rollout_id, wanted.attempt_id, options)

    return await lines_of_rollouts(database, wanted, lines)


async def trajectory_lines(
    database: Transactions, rollout_id: str, attempt_id: str | None = None, options: TrajectoryOptions | None = None
) -> bytes:
    """Read the trajectories of a rollout, a line each."""
    attempts = await database.read(lambda connection: trajectories.attempts_of(connection, rollout_id, attempt_id))
    return await database.run(lambda: _lines(trajectories.merge_all(attempts, options or {})[0]))


@routes.get("/rollouts/{rollout_id}/trajectories", response_model=Trajectories, responses=_answers())
async def get_trajectories(
    rollout_id: Id, wanted: Annotated[TrajectoryQuery, Query()], request: Request, database: Database
) -> Response:
    """Read the trajectories of a rollout, in order; as JSON Lines if `Accept` names `application/jsonl`."""
    return await _answer(request, database, rollout_id, None, wanted)


@routes.get(
    "/rollouts/{rollout_id}/attempts/{attempt_id}/trajectories", response_model=Trajectories, responses=_answers()
)
async def get_trajectories_of_attempt(
    rollout_id: Id, attempt_id: Id, wanted: Annotated[TrajectoryQuery, Query()], request: Request, database: Database
) -> Response:
    """Read the trajectories of an attempt, `latest` or of this id, in order."""
    return await _answer(request, database, rollout_id, attempt_id, wanted)


async def _answer(
    request: Request, database: Transactions, rollout_id: str, attempt_id: str | None, wanted: TrajectoryQuery
) -> Response:
    as_lines, options = wants_lines(request), wanted.options()
    attempts = await database.read(lambda connection: trajectories.attempts_of(connection, rollout_id, attempt_id))

    def work() -> bytes:
        found, left_out = trajectories.merge_all(attempts, options)
        if as_lines:
            return _lines(found)
        return encode({"items": [msgspec.Raw(encode(each.as_dict())) for each in found], "left_out": left_out})

    answer = await database.run(work)
    return Response(answer, media_type=JSON_LINES) if as_lines else Json(answer)


def _lines(found: Iterable[trajectory.Trajectory]) -> bytes:
    return b"".join(encode(each.as_dict()) + b"\n" for each in found)
