"""Routes of generations: received from vLLM servers in messages of `agentlightning.store.wire`, and found.

Times are nanoseconds since the epoch, as vLLM servers send them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, create_model
from sqlalchemy import Connection

from agentlightning import generation as records
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import RoutedExperts, SamplingMask, TopLogprobs, field_types
from agentlightning.server.answers import Json, encode
from agentlightning.server.errors import sentence
from agentlightning.server.limits import BATCH_LIMIT
from agentlightning.server.routes.common import Database, errors, media_type, router, shown
from agentlightning.server.schemas import CallerFilters, Id, Nanoseconds, NullableFilters
from agentlightning.server.transactions import Transactions
from agentlightning.store import Filters, generations, senders, wire
from agentlightning.store.filters import nullable
from agentlightning.store.generations import Cursor
from agentlightning.store.wire import IN_BLOCKS, MEDIA_TYPE, VERSIONS, Envelope, Refusal

__all__ = ["routes"]

JSON = "application/json"
LINES = ("application/jsonl", "application/x-ndjson")
WHOLE = [version for version in VERSIONS if not wire.has_blocks(version)]
GENERATIONS_AT_ONCE = 64

ReadPage = Callable[[Cursor | None], Awaitable[tuple[list[records.Generation], Cursor | None]]]
"""Read the page of a request that begins behind this position."""

routes = router("generations")

BINARY = {"schema": {"type": "string", "format": "binary"}}
MESSAGE = {"requestBody": {"required": True, "content": {MEDIA_TYPE: BINARY, IN_BLOCKS: BINARY}}}
FOUND = {
    "description": "A page as JSON or as a message; or, as lines of JSON, all from the cursor on, whatever the limit.",
    "content": {MEDIA_TYPE: BINARY, **{kind: {"schema": {"type": "string"}} for kind in LINES}},
}


_FILTERS: Any = {name: (of | None, None) for name, of in get_type_hints(Filters).items()}
_NULLABLE: type[NullableFilters[Any]] = NullableFilters[Literal[nullable(Filters)]]


class GenerationFilters(CallerFilters, create_model("_Filters", __base__=_NULLABLE, **_FILTERS)):
    """Filters of generations: those that match all of them."""

    since: Nanoseconds | None = Field(None, description="Only those that finished at this time or later.")
    until: Nanoseconds | None = Field(None, description="Only those that finished before this time.")

    def filters(self) -> Filters:
        """Return the filters of the store."""
        return self.given(Filters)


class GenerationQuery(GenerationFilters):
    """Filters and page of generations."""

    limit: int = Field(100, ge=1, le=1000)
    details: bool = Field(
        True, description="Whether to tell what there is for each id: logprobs, sampling masks and routed experts."
    )
    # Every such text is a position: none is invalid.
    cursor: str | None = Field(
        None, pattern="^[0-9a-f]{16}[0-7][0-9a-f]{15}$", description="`next` of the previous page."
    )

    def after(self) -> Cursor | None:
        """Return where the previous page ended; None for the first page."""
        if self.cursor is None:
            return None
        return Cursor(int(self.cursor[:16], 16) - 2**63, int(self.cursor[16:], 16))


def cursor_of(end: Cursor | None) -> str | None:
    """Encode the position where a page ends, for the request of the next one."""
    return None if end is None else f"{end.finished_at + 2**63:016x}{end.key:016x}"


class IdLogprob(BaseModel):
    """The logprob of an id."""

    id: int
    logprob: float | None


_AS_JSON: dict[Any, Any] = {
    # An infinite logprob is null.
    list[float]: list[float | None],
    RoutedExperts: list[list[list[int]]],
    SamplingMask: list[list[int]],
    TopLogprobs: list[list[IdLogprob]],
}


def _schema_of(kind: type, title: str, **others: Any) -> Any:
    """Derive the schema of a record from its dataclass; unknown fields are null, never absent."""
    types = field_types(kind, _AS_JSON) | others
    found: Any = {name: (of, ...) for name, of in types.items()}
    return create_model(kind.__name__, __doc__=title, **found)


Choice = _schema_of(records.Choice, "One of the answers to a prompt. What is unknown is null.")
Generation = _schema_of(records.Generation, "One request to the engine. What is unknown is null.", choices=list[Choice])
Loss = _schema_of(records.Loss, "Generations that could not be stored.")


class GenerationPage(BaseModel):
    """A page of generations, in the order in which they finished."""

    items: list[Generation]  # pyright: ignore[reportInvalidTypeForm]
    next: str | None = Field(description="Cursor of the next page; null where there is none.")


class Refused(BaseModel):
    """A generation that no store can hold."""

    id: str
    reason: str


class Added(BaseModel):
    """Result of storing generations: all that were not refused are stored."""

    new: int = Field(description="Number of generations that were not stored before.")
    refused: list[Refused]
    sender: Literal["known", "unknown"] | None = Field(
        None, description="Absent if the message names no sender. An unknown sender should register."
    )
    blocks: dict[str, tuple[list[int], list[int]]] | None = Field(
        None, description="The keys of the blocks in the message, for the ids and the text of each generation's prompt."
    )
    lacking: list[str] | None = Field(
        None, description="Generations that continue blocks which the store does not have: to be sent with all blocks."
    )


class Tally(BaseModel):
    """Number of generations by status."""

    finished: int
    aborted: int
    error: int


class Losses(BaseModel):
    """Reports of losses, in the order in which they were stored."""

    items: list[Loss]  # pyright: ignore[reportInvalidTypeForm]


@routes.post(
    "/generations",
    status_code=201,
    response_model=Added,
    responses={**errors(429), 200: {"model": Added, "description": "None of them was new."}},
    openapi_extra=MESSAGE,
)
async def add_generations(request: Request, database: Database) -> Response:
    """Store generations and reports of losses, each once; those that cannot be stored are named in the answer."""
    content_type = media_type(request)
    if content_type not in VERSIONS:
        wanted = f"{MEDIA_TYPE} or {IN_BLOCKS}"
        return sentence(415, f"generations have the content type {wanted}; this body has {shown(content_type)}")
    body = await request.body()
    if wire.count(body) > BATCH_LIMIT:
        return sentence(413, f"the body has more than {BATCH_LIMIT} generations and losses")
    try:
        message, refused = await database.run(lambda: wire.decode_each(body, content_type))
    except wire.TooMuch as error:
        return sentence(413, str(error))
    except ValueError as error:
        return sentence(400, f"the body {error}")
    added = await _store(database, message)
    if message.losses:
        await database.write(lambda connection: generations.add_losses(connection, message.losses))
    refused += [Refusal(generation_id, reason) for generation_id, reason in added.refused.items()]
    answer: dict[str, Any] = {"new": added.new, "refused": refused}
    if wire.has_blocks(content_type):
        answer |= {"blocks": added.blocks, "lacking": added.lacking}
    if message.sender is not None:
        known = await database.read(lambda connection: senders.is_known(connection, message.sender))
        answer["sender"] = "known" if known else "unknown"
    return Json(answer, 201 if added.new else 200)


async def _store(database: Transactions, message: Envelope) -> generations.Added:
    """Store the generations of a message that can be stored."""
    new, prompts, sender_id = message.generations, message.prompts, message.sender
    if not new:
        return generations.Added()

    def add(connection: Connection) -> generations.Added:
        how_many = generations.add(connection, new, sender_id, prompts)
        return generations.Added(how_many, blocks=generations.keys_of_blocks(connection, prompts))

    def add_valid(connection: Connection) -> generations.Added:
        return generations.add_valid(connection, new, sender_id, database.explanation, prompts)

    try:
        return await database.write(add)
    except (StoreUnavailable, StoreRefused):
        raise
    except Exception:
        # One of them is at fault, whatever the error: a sender would repeat it for ever, and all that follows would
        # wait. It is isolated in a second transaction, which keeps the usual one fast.
        return await database.write(add_valid)


@routes.get("/generations", response_model=GenerationPage, responses={**errors(), 200: FOUND})
async def query_generations(
    request: Request, wanted: Annotated[GenerationQuery, Query()], database: Database
) -> Response:
    """Find generations, in the order in which they finished."""
    filters, after, accepted = wanted.filters(), wanted.after(), _accepted(request)
    limit = GENERATIONS_AT_ONCE if accepted in LINES else wanted.limit

    async def page(after: Cursor | None) -> tuple[list[records.Generation], Cursor | None]:
        return await database.read(
            lambda connection: generations.page(connection, filters, after, limit, wanted.details)
        )

    found, end = await page(after)
    if accepted in LINES:
        return StreamingResponse(_lines(database, page, found, end), media_type=accepted)
    cursor = cursor_of(end)
    if accepted in WHOLE:
        message = await database.run(lambda: wire.encode(found, cursor=cursor, version=accepted))
        return Response(message, media_type=accepted)
    items = await database.run(lambda: [msgspec.Raw(_json(each)) for each in found])
    return Json({"items": items, "next": cursor})


@routes.get("/generations/tally", response_model=Tally, responses=errors())
async def tally_generations(wanted: Annotated[GenerationFilters, Query()], database: Database) -> Response:
    """Count generations by status."""
    filters = wanted.filters()
    return Json(await database.read(lambda connection: generations.tally(connection, filters)))


@routes.get("/generations/{generation_id}", response_model=Generation, responses=errors(404))
async def get_generation(generation_id: Id, database: Database) -> Response:
    """Find a generation."""
    found = await database.read(lambda connection: generations.find(connection, generation_id))
    if found is None:
        return sentence(404, f"there is no generation {generation_id[:100]!r}")
    return Json(await database.run(lambda: _json(found)))


@routes.get("/losses", response_model=Losses, responses=errors())
async def query_losses(database: Database) -> Response:
    """List the reports of generations that vLLM servers could not store."""
    return Json({"items": await database.read(lambda connection: list(generations.losses(connection)))})


async def _lines(
    database: Transactions, page: ReadPage, found: list[records.Generation], end: Cursor | None
) -> AsyncIterator[bytes]:
    """Yield all generations from the first page on; one page at a time is in memory."""
    while True:
        yield await database.run(lambda some=found: b"".join(_json(each) + b"\n" for each in some))
        if end is None:
            return
        found, end = await page(end)


def _accepted(request: Request) -> str:
    """Return the first media type that the client accepts and this route offers."""
    for each in request.headers.get("accept", "").split(","):
        accepted = each.partition(";")[0].strip().lower()
        if accepted in (JSON, *WHOLE, *LINES):
            return accepted
    return JSON


def _json(generation: records.Generation) -> bytes:
    fields: dict[str, Any] = generation.as_dict()
    try:
        return encode(fields)
    except UnicodeEncodeError:
        return encode(wire.without_surrogates(fields))
