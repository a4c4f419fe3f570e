"""Rollouts and their attempts, the queue, and who waits for them."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import Body, Query, Request, Response
from sqlalchemy import Connection, select

from agentlightning.server.answers import Json, attempt, encode, page, rollout
from agentlightning.server.decoding import without_nan
from agentlightning.server.errors import sentence
from agentlightning.server.limits import DEQUEUE_LIMIT
from agentlightning.server.models import rollouts as models
from agentlightning.server.models.common import Id, Page
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import rollouts
from agentlightning.store.database import in_parts
from agentlightning.store.pages import contains, matching
from agentlightning.store.tables import attempts as attempts_table
from agentlightning.store.tables import rollouts as rollouts_table

__all__ = ["routes"]

SHORTEST_NAP, LONGEST_NAP = 0.02, 0.5

routes = router("rollouts", mend=without_nan)


def _new(body: models.NewRollout) -> rollouts.NewRollout:
    config = rollouts.Config() if body.config is None else body.config.as_config()
    return rollouts.NewRollout(_text(body.input), body.mode, body.resources_id, config, _text(body.metadata or {}))


def _text(value: Any) -> str:
    return encode(value).decode()


@routes.post("/queues/rollouts/enqueue", status_code=201, response_model=list[models.Rollout], responses=errors())
async def enqueue_rollouts(body: models.Enqueue, database: Database) -> Response:
    """Put rollouts into the queue."""
    new = [_new(each) for each in body.rollouts]

    def work(connection: Connection) -> list[Any]:
        return _found(connection, rollouts.enqueue(connection, new))

    return Json([rollout(row) for row in await database.write(work)], 201)


@routes.post("/queues/rollouts/dequeue", response_model=list[models.AttemptedRollout], responses=errors())
async def dequeue_rollouts(database: Database, body: Annotated[models.Dequeue | None, Body()] = None) -> Response:
    """Take the rollouts that have been queued the longest, each with a new attempt; nobody else gets them."""
    asked = body or models.Dequeue(limit=1)
    if asked.limit < 1:
        return Json([])

    def work(connection: Connection) -> list[Any]:
        # Fewer than were asked for are a good answer: to a refusal, 0.3's client says that the queue is empty.
        return _found(connection, rollouts.dequeue(connection, min(asked.limit, DEQUEUE_LIMIT), asked.worker_id))

    return Json([rollout(row) for row in await database.write(work)])


@routes.post("/rollouts", status_code=201, response_model=models.AttemptedRollout, responses=errors())
async def start_rollout(body: models.StartRollout, database: Database) -> Response:
    """Make a rollout that is run at once, with its first attempt."""
    new = _new(body)

    def work(connection: Connection) -> Any:
        return rollouts.find(connection, rollouts.start(connection, new, body.worker_id))

    return Json(rollout(await database.write(work)), 201)


@routes.get("/rollouts", response_model=Page[models.AttemptedRollout | models.Rollout], responses=errors())
async def query_rollouts(asked: Annotated[models.QueryRollouts, Query()], database: Database) -> Response:
    """Find rollouts."""
    return await _page_of_rollouts(asked, database)


@routes.post("/rollouts/search", response_model=Page[models.AttemptedRollout | models.Rollout], responses=errors())
async def search_rollouts(asked: models.QueryRollouts, database: Database) -> Response:
    """Find rollouts, where what is asked for does not fit into a URL."""
    return await _page_of_rollouts(asked, database)


@routes.get(
    "/rollouts/{rollout_id}", response_model=models.AttemptedRollout | models.Rollout | None, responses=errors()
)
async def get_rollout(rollout_id: Id, database: Database) -> Response:
    """A rollout with its latest attempt; null where there is none of this id."""
    row = await database.read(lambda connection: rollouts.find(connection, rollout_id))
    return Json(None if row is None else rollout(row))


@routes.post("/rollouts/{rollout_id}", response_model=models.Rollout, responses=errors(404))
async def update_rollout(rollout_id: Id, body: models.ChangeRollout, database: Database) -> Response:
    """Change a rollout."""
    changes: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    if body.config is not None:
        changes["config"] = body.config.as_config()
    for name in ("input", "metadata"):
        if name in changes and (name == "input" or changes[name] is not None):
            changes[name] = _text(changes[name])

    def work(connection: Connection) -> Any:
        rollouts.update_rollout(connection, rollout_id, **changes)
        return rollouts.find(connection, rollout_id)

    return Json(rollout(await database.write(work), with_attempt=False))


@routes.post(
    "/rollouts/{rollout_id}/attempts",
    status_code=201,
    response_model=models.AttemptedRollout,
    responses=errors(404),
)
async def start_attempt(
    rollout_id: Id, database: Database, body: Annotated[models.StartAttempt | None, Body()] = None
) -> Response:
    """Make one more attempt, whatever became of those before."""

    def work(connection: Connection) -> Any:
        rollouts.start_attempt(connection, rollout_id, body.worker_id if body else None)
        return rollouts.find(connection, rollout_id)

    return Json(rollout(await database.write(work)), 201)


@routes.get("/rollouts/{rollout_id}/attempts", response_model=Page[models.Attempt], responses=errors())
async def query_attempts(
    rollout_id: Id, asked: Annotated[models.QueryAttempts, Query()], database: Database
) -> Response:
    """The attempts of a rollout."""
    return await _page_of_attempts(rollout_id, asked, database)


@routes.post("/rollouts/{rollout_id}/attempts/search", response_model=Page[models.Attempt], responses=errors())
async def search_attempts(rollout_id: Id, asked: models.QueryAttempts, database: Database) -> Response:
    """The attempts of a rollout."""
    return await _page_of_attempts(rollout_id, asked, database)


@routes.get("/rollouts/{rollout_id}/attempts/latest", response_model=models.Attempt | None, responses=errors())
async def get_latest_attempt(rollout_id: Id, database: Database) -> Response:
    """The latest attempt of a rollout; null where there is none."""
    row = await database.read(lambda connection: rollouts.find(connection, rollout_id))
    return Json(attempt(row, rollout_id, "attempt_") if row is not None and row.attempts else None)


@routes.post("/rollouts/{rollout_id}/attempts/{attempt_id}", response_model=models.Attempt, responses=errors(404))
async def update_attempt(rollout_id: Id, attempt_id: Id, body: models.ChangeAttempt, database: Database) -> Response:
    """Change an attempt, `latest` or of this id; the status of the latest is its rollout's."""
    changes: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    if "metadata" in changes:
        changes["metadata"] = _text(changes["metadata"])
    row = await database.write(
        lambda connection: rollouts.update_attempt(connection, rollout_id, attempt_id, **changes)
    )
    return Json(attempt(row, rollout_id))


@routes.post("/waits/rollouts", response_model=list[models.Rollout], responses=errors())
async def wait_for_rollouts(request: Request, body: models.WaitForRollouts, database: Database) -> Response:
    """Wait until rollouts have ended, and answer with those that have."""
    ends = None if body.timeout is None else time.monotonic() + body.timeout
    wanted = list(dict.fromkeys(body.rollout_ids))
    nap = SHORTEST_NAP
    while True:
        found = await database.read(lambda connection: _found(connection, wanted))
        ended = [row for row in found if row.status in rollouts.FINISHED]
        if len(ended) == len(found) or (ends is not None and time.monotonic() >= ends):
            return Json([rollout(row, with_attempt=False) for row in ended])
        if request.app.state.is_stopping():
            # Not what has ended by now: without a timeout, whoever asked would take it for all.
            return sentence(503, "the store is being stopped", {"Retry-After": "1"})
        if await request.is_disconnected():
            return Response(status_code=499)
        await asyncio.sleep(nap if ends is None else max(0.0, min(nap, ends - time.monotonic())))
        nap = min(2 * nap, LONGEST_NAP)


async def _page_of_rollouts(asked: models.QueryRollouts, database: Database) -> Response:
    table = rollouts_table
    conditions = []
    if asked.status_in is not None:
        conditions.append(table.c.status.in_(asked.status_in))
    if asked.rollout_id_in is not None:
        conditions.append(table.c.rollout_id.in_(asked.rollout_id_in))
    if asked.rollout_id_contains is not None:
        conditions.append(contains(table.c.rollout_id, asked.rollout_id_contains))
    where = matching(conditions, asked.filter_logic)
    return await page(database, asked, lambda _: where, rollouts.with_latest_attempt(), table.c.key, rollout)


async def _page_of_attempts(rollout_id: str, asked: models.QueryAttempts, database: Database) -> Response:
    table = attempts_table
    key = select(rollouts_table.c.key).where(rollouts_table.c.rollout_id == rollout_id).scalar_subquery()
    of_rollout = table.c.rollout_key == key
    query = select(table).where(of_rollout)
    return await page(
        database, asked, lambda _: of_rollout, query, table.c.sequence_id, lambda row: attempt(row, rollout_id)
    )


def _found(connection: Connection, rollout_ids: list[str]) -> list[Any]:
    """The rollouts of these ids, in this order."""
    found: dict[str, Any] = {}
    for some in in_parts(rollout_ids):
        query = rollouts.with_latest_attempt().where(rollouts_table.c.rollout_id.in_(some))
        found |= {row.rollout_id: row for row in connection.execute(query)}
    return [found[each] for each in rollout_ids if each in found]
