"""What the model calls of a rollout were, token by token, and what they were worth."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from agentlightning.server.answers import Json, encode, span
from agentlightning.server.models import triplets as models
from agentlightning.server.models.common import Id
from agentlightning.server.models.spans import KeptSpan
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.transactions import Transactions
from agentlightning.store import attributes, rollouts, spans, triplets
from agentlightning.store.database import now
from agentlightning.store.rollouts import Unknown
from agentlightning.triplet import Triplet

__all__ = ["items", "routes"]

JSON_LINES = "application/jsonl"

routes = router("triplets")


def _answers(**content: Any) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer that is JSON Lines, or may be."""
    lines = {JSON_LINES: {"schema": {"type": "string", "description": "A Triplet a line."}}}
    return {200: {"description": "Triplets.", "content": {**lines, **content}}, **errors()}


@routes.get("/triplets", response_class=Response, responses=_answers())
async def query_triplets(asked: Annotated[models.QueryTriplets, Query()], database: Database) -> Response:
    """Those of all rollouts, one after the other, or of the one that is asked for, as JSON Lines."""
    one = asked.rollout_id
    rollout_ids = await database.read(triplets.rollouts_of) if one is None else [one]

    async def parts() -> AsyncIterator[bytes]:
        for each in rollout_ids:
            yield await database.read(lambda connection, each=each: _lines(_found(connection, each, asked.attempt_id)))

    return StreamingResponse(parts(), media_type=JSON_LINES)


@routes.get("/rollouts/{rollout_id}/triplets", response_model=models.Triplets, responses=_answers())
async def get_triplets(rollout_id: Id, request: Request, database: Database) -> Response:
    """Those of a rollout, in order; as JSON Lines where `Accept` has `application/jsonl`."""
    return await _answer(request, database, rollout_id, None)


@routes.get(
    "/rollouts/{rollout_id}/attempts/{attempt_id}/triplets", response_model=models.Triplets, responses=_answers()
)
async def get_triplets_of_attempt(rollout_id: Id, attempt_id: Id, request: Request, database: Database) -> Response:
    """Those of an attempt, `latest` or of this id, in order."""
    return await _answer(request, database, rollout_id, attempt_id)


@routes.post(
    "/rollouts/{rollout_id}/attempts/{attempt_id}/reward",
    status_code=201,
    response_model=KeptSpan,
    responses=errors(404),
)
async def add_reward(rollout_id: Id, attempt_id: Id, body: models.Reward, database: Database) -> Response:
    """Reward an attempt, `latest` or of this id, or a call of it. Of several rewards of the same, the last counts."""

    def work(connection: Connection) -> spans.NewSpan:
        found = _attempt_of(connection, rollout_id, attempt_id)
        if found is None or not rollouts.heard_of(connection, rollout_id, found):
            raise Unknown(f"there is no attempt {attempt_id!r} of a rollout {rollout_id!r}")
        if body.generation_id is not None and not triplets.has_call(connection, rollout_id, body.generation_id):
            raise Unknown(f"there is no generation {body.generation_id!r} of the rollout {rollout_id!r}")
        new = _reward(body, rollout_id, found, now(connection))
        spans.add(connection, [new])
        return new

    return Json(span(await database.write(work)), 201)


async def _answer(request: Request, database: Transactions, rollout_id: str, attempt_id: str | None) -> Response:
    wants_lines = JSON_LINES in request.headers.get("accept", "")

    def work(connection: Connection) -> bytes:
        found = _found(connection, rollout_id, attempt_id)
        return _lines(found) if wants_lines else items(found)

    answer = await database.read(work)
    return Response(answer, media_type=JSON_LINES) if wants_lines else Json(answer)


def _found(connection: Connection, rollout_id: str, attempt_id: str | None) -> list[Triplet]:
    if attempt_id == "latest" and (attempt_id := _attempt_of(connection, rollout_id, attempt_id)) is None:
        return []
    return triplets.of_rollout(connection, rollout_id, attempt_id)


def _attempt_of(connection: Connection, rollout_id: str, attempt_id: str) -> str | None:
    if attempt_id != "latest":
        return attempt_id
    found = rollouts.find(connection, rollout_id)
    return None if found is None else found.attempt_id


def items(found: Iterable[Triplet]) -> bytes:
    """As JSON. One by one: the numbers of all of them at once are more than a processor has near, at half the speed."""
    return encode({"items": [msgspec.Raw(encode(each.as_dict())) for each in found]})


def _lines(found: Iterable[Triplet]) -> bytes:
    return b"".join(encode(each.as_dict()) + b"\n" for each in found)


def _reward(given: models.Reward, rollout_id: str, attempt_id: str, moment: float) -> spans.NewSpan:
    """The span that `emit_reward` of 0.3 would have made."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    body = {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": None,
        "name": attributes.ANNOTATION,
        "status": {"status_code": "OK", "description": None},
        "attributes": attributes.reward_attributes(given.value, given.generation_id),
        "events": [],
        "links": [],
        "start_time": moment,
        "end_time": moment,
        "context": {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": {}},
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    }
    return spans.NewSpan(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=None,
        trace_id=trace_id,
        span_id=span_id,
        parent_id=None,
        name=attributes.ANNOTATION,
        start_time=moment,
        end_time=moment,
        response_id=None,
        reward=given.value,
        body=encode(body),
    )
