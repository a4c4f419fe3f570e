"""Generations: taken from vLLM servers, in messages of `agentlightning.store.wire`, and found again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.server.answers import Json, encode
from agentlightning.server.decoding import header
from agentlightning.server.errors import sentence
from agentlightning.server.limits import BATCH_LIMIT
from agentlightning.server.models import generations as models
from agentlightning.server.models.common import Id
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.transactions import Transactions
from agentlightning.store import Filters, senders, wire
from agentlightning.store import generations as kept
from agentlightning.store.generations import Place
from agentlightning.store.wire import MEDIA_TYPE, Refusal

__all__ = ["routes"]

JSON = "application/json"
LINES = ("application/jsonl", "application/x-ndjson")
GENERATIONS_AT_ONCE = 64
# Fewer than may wait, so that there is room for the writes of others.
ALONE_AT_ONCE = 100

logger = logging.getLogger("agentlightning.store")

routes = router("generations")

BINARY = {"schema": {"type": "string", "format": "binary"}}
MESSAGE = {"requestBody": {"required": True, "content": {MEDIA_TYPE: BINARY}}}
FOUND = {
    "description": "A page as JSON or as a message; or, as lines of JSON, all from the cursor on, whatever the limit.",
    "content": {MEDIA_TYPE: BINARY, **{kind: {"schema": {"type": "string"}} for kind in LINES}},
}


@routes.post(
    "/generations",
    status_code=201,
    response_model=models.Added,
    responses={**errors(429), 200: {"model": models.Added, "description": "None of them was new."}},
    openapi_extra=MESSAGE,
)
async def add_generations(request: Request, database: Database) -> Response:
    """Keep generations, each once, and losses. Those that cannot be kept are named, and all others kept."""
    content_type = (header(request.scope, "content-type") or "").partition(";")[0].strip().lower()
    if content_type != MEDIA_TYPE:
        found = repr(content_type[:100]) if content_type else "without a Content-Type"
        return sentence(415, f"generations come as {MEDIA_TYPE}, and this is {found}")
    body = await request.body()
    if wire.count(body) > BATCH_LIMIT:
        return sentence(413, f"the body has more than {BATCH_LIMIT} generations and losses")
    try:
        message, refused = await database.run(lambda: wire.decode_each(body))
    except ValueError as error:
        return sentence(400, f"the body {error}")
    new, also = await _written(database, message.generations, message.sender)
    if message.losses:
        await database.write(lambda connection: kept.add_losses(connection, message.losses))
    answer: dict[str, Any] = {"new": new, "refused": [*refused, *also]}
    if message.sender is not None:
        known = await database.read(lambda connection: senders.is_known(connection, message.sender))
        answer["sender"] = "known" if known else "unknown"
    return Json(answer, 201 if new else 200)


async def _written(
    database: Transactions, generations: Sequence[Generation], sender_id: str | None
) -> tuple[int, list[Refusal]]:
    """How many were new, and which of them cannot be kept."""
    if not generations:
        return 0, []
    try:
        return await database.write(lambda connection: kept.add(connection, generations, sender_id)), []
    except (StoreUnavailable, StoreRefused):
        raise
    except Exception as error:
        # Whatever it is: one that always fails would be sent again for ever, and all that comes after it would wait.
        if not isinstance(error, ValueError):
            logger.exception("generations cannot be kept")
        if len(generations) == 1:
            return 0, [Refusal(generations[0].id, str(error) or type(error).__name__)]
    # One of them is at fault, and the others shall not be lost with it.
    new, refused = 0, []
    for start in range(0, len(generations), ALONE_AT_ONCE):
        alone = [_written(database, [each], sender_id) for each in generations[start : start + ALONE_AT_ONCE]]
        for more, named in await asyncio.gather(*alone):
            new += more
            refused += named
    return new, refused


@routes.get("/generations", response_model=models.GenerationPage, responses={**errors(), 200: FOUND})
async def query_generations(
    request: Request, asked: Annotated[models.GenerationQuery, Query()], database: Database
) -> Response:
    """Find generations, in the order in which they finished."""
    filters, after, accepted = asked.filters(), asked.after(), _accepted(request)
    limit = GENERATIONS_AT_ONCE if accepted in LINES else asked.limit
    found, end = await database.read(lambda connection: kept.page(connection, filters, after, limit))
    if accepted in LINES:
        return StreamingResponse(_lines(database, filters, found, end), media_type=accepted)
    cursor = models.cursor_of(end)
    if accepted == MEDIA_TYPE:
        message = await database.run(lambda: wire.encode(found, cursor=cursor))
        return Response(message, media_type=MEDIA_TYPE)
    items = await database.run(lambda: [msgspec.Raw(_json(each)) for each in found])
    return Json({"items": items, "next": cursor})


@routes.get("/generations/tally", response_model=models.Tally, responses=errors())
async def tally_generations(asked: Annotated[models.GenerationFilters, Query()], database: Database) -> Response:
    """How many generations there are."""
    filters = asked.filters()
    return Json(await database.read(lambda connection: kept.tally(connection, filters)))


@routes.get("/generations/{generation_id}", response_model=models.Generation, responses=errors(404))
async def get_generation(generation_id: Id, database: Database) -> Response:
    """A generation."""
    found = await database.read(lambda connection: kept.find(connection, generation_id))
    if found is None:
        return sentence(404, f"there is no generation {generation_id[:100]!r}")
    return Json(await database.run(lambda: _json(found)))


@routes.get("/losses", response_model=models.Losses, responses=errors())
async def query_losses(database: Database) -> Response:
    """What vLLM servers could not have kept."""
    return Json({"items": await database.read(lambda connection: list(kept.losses(connection)))})


async def _lines(
    database: Transactions, filters: Filters, found: list[Generation], end: Place | None
) -> AsyncIterator[bytes]:
    """All of them from the first page on, of which only one is in memory."""
    while True:
        yield await database.run(lambda some=found: b"".join(_json(each) + b"\n" for each in some))
        if end is None:
            return
        found, end = await database.read(
            lambda connection, after=end: kept.page(connection, filters, after, GENERATIONS_AT_ONCE)
        )


def _accepted(request: Request) -> str:
    """The first of what the client accepts that there is."""
    for each in request.headers.get("accept", "").split(","):
        media_type = each.partition(";")[0].strip().lower()
        if media_type in (JSON, MEDIA_TYPE, *LINES):
            return media_type
    return JSON


def _json(generation: Generation) -> bytes:
    fields: dict[str, Any] = generation.as_dict()
    try:
        return encode(fields)
    except UnicodeEncodeError:
        return encode(wire.without_surrogates(fields))
