"""Routes of rollouts, their attempts and their queue, as the LightningStore interface of Agent Lightning 0.3 has them.

Times are seconds since the epoch. Clients of 0.3 clear an id by sending an empty one, so ids in bodies may be empty.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import Body, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from sqlalchemy import Connection

from agentlightning import rollout_records as records
from agentlightning.errors import NotFound
from agentlightning.rollout_records import AttemptStatus, Mode, RolloutStatus
from agentlightning.server import schemas
from agentlightning.server.answers import Json, document, listed, raw
from agentlightning.server.decoding import without_nan
from agentlightning.server.errors import sentence
from agentlightning.server.limits import BATCH_LIMIT, DEQUEUE_LIMIT
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.schemas import LEFT_OUT, Id, Logic, Page, Part, Seconds, Sent, Whole, example
from agentlightning.store import lifecycle, rollouts
from agentlightning.store.completeness import Endings, endings

__all__ = ["routes"]

SHORTEST_NAP, LONGEST_NAP = 0.02, 0.5

routes = router("rollouts", mend=without_nan)


Penalty = Annotated[float, Field(ge=-2, le=2)]


class Sampling(BaseModel):
    """Sampling parameters that a vLLM with `AGL_SAMPLING` pins, as `agentlightning.sampling` has them."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"temperature": 0.7}]})

    # vLLM itself makes 0.01 of what is nearer to 0.
    temperature: Annotated[float, Field(ge=0, le=0)] | Annotated[float, Field(ge=0.01, le=2)] = LEFT_OUT
    top_p: Annotated[float, Field(gt=0, le=1)] = LEFT_OUT
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1, description="-1 or 0 for all.")] = LEFT_OUT
    min_p: Annotated[float, Field(ge=0, le=1)] = LEFT_OUT
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = LEFT_OUT
    presence_penalty: Penalty = LEFT_OUT
    frequency_penalty: Penalty = LEFT_OUT


class SamplingByMode(BaseModel):
    """The same by the mode of a rollout."""

    model_config = ConfigDict(extra="forbid")

    train: Sampling | Literal["client"] | None = LEFT_OUT
    val: Sampling | Literal["client"] | None = LEFT_OUT
    test: Sampling | Literal["client"] | None = LEFT_OUT


def _as_sent(value: Any, _: Any) -> Any:
    """Leave a value to the store, which validates it for all that it stores; the type above is for the document."""
    return value


class RolloutConfig(Sent):
    """Timeouts of an attempt, and when another one follows."""

    model_config = example(
        timeout_seconds=600.0, unresponsive_seconds=60.0, max_attempts=3, retry_condition=["timeout"]
    )

    timeout_seconds: Seconds | None = Field(None, description="Longest duration of an attempt; null for no limit.")
    unresponsive_seconds: Seconds | None = Field(
        None, description="Longest time without a sign of life of an attempt; null for no limit."
    )
    max_attempts: Whole = Field(1, ge=1, le=2**31 - 1, description="Number of attempts, the first included.")
    retry_condition: list[AttemptStatus] = Field(
        [], max_length=64, description="States of an attempt after which another one is queued."
    )
    sampling: Annotated[Sampling | SamplingByMode | Literal["client"] | None, WrapValidator(_as_sent)] = Field(
        None,
        description="Sampling parameters that a vLLM with `AGL_SAMPLING` pins for its calls; see `docs/sampling.md`.",
    )

    def as_record(self) -> records.RolloutConfig:
        sampling: Any = self.sampling
        return records.RolloutConfig(**self.model_dump(exclude={"sampling"}), sampling=sampling)


class NewRollout(Sent):
    """A rollout to create."""

    model_config = example(input={"question": "What is 6 x 7?"}, mode="train", metadata={"split": 1})

    input: Any = Field(description="The task: any JSON.")
    mode: Mode | None = None
    resources_id: Part | None = Field(None, description="Null for the latest resources.")
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None

    def as_record(self) -> records.NewRollout:
        config = records.RolloutConfig() if self.config is None else self.config.as_record()
        return records.NewRollout(raw(self.input), self.mode, self.resources_id, config, raw(self.metadata or {}))


class StartRollout(NewRollout):
    """A rollout that the client runs at once."""

    worker_id: Part | None = None


class Enqueue(Sent):
    """Rollouts for the queue, in this order."""

    model_config = example(rollouts=[{"input": {"question": "What is 6 x 7?"}, "mode": "train"}])

    rollouts: list[NewRollout] = Field(max_length=BATCH_LIMIT)


class Dequeue(Sent):
    """Number of rollouts that a worker takes."""

    model_config = example(limit=1, worker_id="runner-1")

    limit: Whole = Field(1, description=f"At most {DEQUEUE_LIMIT} are taken at once.")
    worker_id: Part | None = None


class ChangeRollout(Sent):
    """Fields of a rollout to change; an omitted field stays unchanged."""

    model_config = example(status="cancelled")

    input: Any = LEFT_OUT
    mode: Mode | None = None
    resources_id: Part | None = None
    status: RolloutStatus = LEFT_OUT
    config: RolloutConfig = LEFT_OUT
    metadata: dict[str, Any] | None = None

    def changes(self) -> dict[str, Any]:
        """Return the fields that the client sent."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set}
        if self.config is not None:
            found["config"] = self.config.as_record()
        if "input" in found:
            found["input"] = raw(found["input"])
        return found


class StartAttempt(Sent):
    """The worker that makes the attempt."""

    model_config = example(worker_id="runner-1")

    worker_id: Part | None = None


class ChangeAttempt(Sent):
    """Fields of an attempt to change; an omitted field stays unchanged."""

    model_config = example(status="succeeded")

    status: AttemptStatus = LEFT_OUT
    worker_id: Part = LEFT_OUT
    last_heartbeat_time: Seconds = LEFT_OUT
    metadata: dict[str, Any] = LEFT_OUT


class WaitForRollouts(Sent):
    """Rollouts to wait for."""

    model_config = example(rollout_ids=["ro-1"], timeout=5.0)

    rollout_ids: list[Id] = Field(max_length=BATCH_LIMIT)
    timeout: float | None = Field(None, description="Seconds; null to wait until all have ended.")
    recorded: bool = Field(
        False,
        description="Wait also until every vLLM server that is alive has written all that had ended by then.",
    )


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
    """A task, and what has become of it."""

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


class QueryRollouts(schemas.Query):
    """Filters, order and page of rollouts."""

    model_config = example(status_in=["queuing", "running"], limit=100)

    status_in: list[RolloutStatus] | None = Field(None, max_length=64)
    rollout_id_in: list[Part] | None = Field(None, max_length=BATCH_LIMIT)
    rollout_id_contains: Part | None = None
    filter_logic: Logic = "and"
    sort_by: (
        Literal["rollout_id", "input", "start_time", "end_time", "mode", "resources_id", "status", "config", "metadata"]
        | None
    ) = None


class QueryAttempts(schemas.Query):
    """Order and page of a rollout's attempts."""

    model_config = example(sort_by="start_time", sort_order="desc")

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


def _rollout(row: Any, *, with_attempt: bool = True) -> dict[str, Any]:
    return rollouts.rollout_fields(row, document, with_attempt=with_attempt)


@routes.post("/queues/rollouts/enqueue", status_code=201, response_model=list[Rollout], responses=errors())
async def enqueue_rollouts(body: Enqueue, database: Database) -> Response:
    """Append rollouts to the queue."""
    new = [each.as_record() for each in body.rollouts]

    def work(connection: Connection) -> list[Any]:
        return rollouts.find_all(connection, lifecycle.enqueue(connection, new))

    return Json([_rollout(row) for row in await database.write(work)], 201)


@routes.post("/queues/rollouts/dequeue", response_model=list[AttemptedRollout], responses=errors())
async def dequeue_rollouts(database: Database, body: Annotated[Dequeue | None, Body()] = None) -> Response:
    """Take the rollouts that have been queued longest, each with a new attempt; no other client gets them."""
    wanted = body or Dequeue(limit=1)
    if wanted.limit < 1:
        return Json([])

    # Fewer than were asked for is a good answer: 0.3's client takes a refusal for an empty queue.
    taken = lifecycle.Dequeue(min(wanted.limit, DEQUEUE_LIMIT), wanted.worker_id)
    return Json([_rollout(row) for row in await database.write_together(lifecycle.dequeue_all, taken)])


@routes.post("/rollouts", status_code=201, response_model=AttemptedRollout, responses=errors())
async def start_rollout(body: StartRollout, database: Database) -> Response:
    """Create a rollout that the client runs at once, with its first attempt."""
    new = lifecycle.Start(body.as_record(), body.worker_id)
    return Json(_rollout(await database.write_together(lifecycle.start_all, new)), 201)


@routes.get("/rollouts", response_model=Page[AttemptedRollout | Rollout], responses=errors())
async def query_rollouts(wanted: Annotated[QueryRollouts, Query()], database: Database) -> Response:
    """Find rollouts."""
    return await _listed(wanted, database)


@routes.post("/rollouts/search", response_model=Page[AttemptedRollout | Rollout], responses=errors())
async def search_rollouts(wanted: QueryRollouts, database: Database) -> Response:
    """Find rollouts, with filters that are too long for a URL."""
    return await _listed(wanted, database)


@routes.get("/rollouts/{rollout_id}", response_model=AttemptedRollout | Rollout | None, responses=errors())
async def get_rollout(rollout_id: Id, database: Database) -> Response:
    """Find a rollout with its latest attempt; null where the id is unknown."""
    row = await database.read(lambda connection: rollouts.find(connection, rollout_id))
    return Json(None if row is None else _rollout(row))


@routes.post("/rollouts/{rollout_id}", response_model=Rollout, responses=errors(404))
async def update_rollout(rollout_id: Id, body: ChangeRollout, database: Database) -> Response:
    """Change a rollout."""
    changes = body.changes()

    def work(connection: Connection) -> Any:
        lifecycle.update_rollout(connection, rollout_id, changes)
        return rollouts.find(connection, rollout_id)

    return Json(_rollout(await database.write(work), with_attempt=False))


@routes.delete("/rollouts/{rollout_id}", status_code=204, response_class=Response, responses=errors(404, 409))
async def delete_rollout(rollout_id: Id, database: Database) -> Response:
    """Delete a rollout that has ended, with its attempts, spans and generations, and what only these refer to."""
    if not await database.delete(rollout_id):
        raise NotFound(f"there is no rollout {rollout_id!r}")
    return Response(status_code=204)


@routes.post("/rollouts/{rollout_id}/attempts", status_code=201, response_model=AttemptedRollout, responses=errors(404))
async def start_attempt(
    rollout_id: Id, database: Database, body: Annotated[StartAttempt | None, Body()] = None
) -> Response:
    """Create one more attempt, whatever the state of those before."""

    def work(connection: Connection) -> Any:
        lifecycle.start_attempt(connection, rollout_id, body.worker_id if body else None)
        return rollouts.find(connection, rollout_id)

    return Json(_rollout(await database.write(work)), 201)


@routes.get("/rollouts/{rollout_id}/attempts", response_model=Page[Attempt], responses=errors())
async def query_attempts(rollout_id: Id, wanted: Annotated[QueryAttempts, Query()], database: Database) -> Response:
    """List the attempts of a rollout."""
    return await _listed_attempts(rollout_id, wanted, database)


@routes.post("/rollouts/{rollout_id}/attempts/search", response_model=Page[Attempt], responses=errors())
async def search_attempts(rollout_id: Id, wanted: QueryAttempts, database: Database) -> Response:
    """List the attempts of a rollout."""
    return await _listed_attempts(rollout_id, wanted, database)


@routes.get("/rollouts/{rollout_id}/attempts/latest", response_model=Attempt | None, responses=errors())
async def get_latest_attempt(rollout_id: Id, database: Database) -> Response:
    """Find the latest attempt of a rollout; null where there is none."""
    row = await database.read(lambda connection: rollouts.find(connection, rollout_id))
    return Json(None if row is None else _rollout(row).get("attempt"))


@routes.post("/rollouts/{rollout_id}/attempts/{attempt_id}", response_model=Attempt, responses=errors(404))
async def update_attempt(rollout_id: Id, attempt_id: Id, body: ChangeAttempt, database: Database) -> Response:
    """Change an attempt, `latest` or of this id; the state of the latest decides the state of its rollout."""
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    change = lifecycle.AttemptChange(rollout_id, attempt_id, changes)
    row = await database.write_together(lifecycle.update_attempts, change)
    return Json(rollouts.attempt_fields(row, rollout_id, document))


@routes.post("/rollouts/{rollout_id}/attempts/{attempt_id}/heartbeat", response_model=Attempt, responses=errors(404))
async def heartbeat(rollout_id: Id, attempt_id: Id, database: Database) -> Response:
    """Record a sign of life of an attempt, by the store's clock."""

    def work(connection: Connection) -> Any:
        if not lifecycle.heartbeat(connection, rollout_id, attempt_id):
            raise NotFound(f"the rollout {rollout_id!r} has no attempt {attempt_id!r}")
        return rollouts.find_attempt(connection, rollout_id, attempt_id)

    return Json(rollouts.attempt_fields(await database.write(work), rollout_id, document))


@routes.post("/waits/rollouts", response_model=list[Rollout], responses=errors())
async def wait_for_rollouts(request: Request, body: WaitForRollouts, database: Database) -> Response:
    """Wait until rollouts have ended, and return those that have; with `recorded`, those whose calls are written."""
    ends = None if body.timeout is None else time.monotonic() + body.timeout
    wanted = list(dict.fromkeys(body.rollout_ids))
    nap = SHORTEST_NAP
    found: Endings | None = None
    while True:
        found = await database.read(lambda connection, found=found: endings(connection, wanted, body.recorded, found))
        if found.are_all or (ends is not None and time.monotonic() >= ends):
            ended = await database.read(lambda connection, found=found: rollouts.find_all(connection, found.ended))
            return Json([_rollout(row, with_attempt=False) for row in ended])
        if request.app.state.is_stopping():
            # Not those that have ended so far: a client without a timeout would take them for all.
            return sentence(503, "the store is being stopped", {"Retry-After": "1"})
        if await request.is_disconnected():
            return Response(status_code=499)
        await asyncio.sleep(nap if ends is None else max(0.0, min(nap, ends - time.monotonic())))
        nap = min(2 * nap, LONGEST_NAP)


async def _listed(wanted: QueryRollouts, database: Database) -> Response:
    filters = wanted.status_in, wanted.rollout_id_in, wanted.rollout_id_contains, wanted.filter_logic
    return await listed(database, rollouts.listing(*filters), wanted, _rollout)


async def _listed_attempts(rollout_id: str, wanted: QueryAttempts, database: Database) -> Response:
    def item(row: Any) -> dict[str, Any]:
        return rollouts.attempt_fields(row, rollout_id, document)

    return await listed(database, rollouts.attempt_listing(rollout_id), wanted, item)
