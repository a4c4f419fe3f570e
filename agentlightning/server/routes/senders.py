"""Routes of senders: the vLLM servers that record generations. Times are nanoseconds since the epoch, as theirs are."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import Path, Request, Response
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import Connection

from agentlightning import sender as records
from agentlightning.sender import PACKED_LIMIT
from agentlightning.server.answers import Json
from agentlightning.server.errors import sentence
from agentlightning.server.routes.common import Database, errors, media_type, router, shown
from agentlightning.server.schemas import Part, Sent, Whole, example
from agentlightning.store import senders, watermarks
from agentlightning.store.watermarks import State, Watermark

__all__ = ["routes"]

HOUR = 3600 * 10**9
BYTES = "application/octet-stream"
UNFINISHED_LIMIT = 1 << 16

routes = router("senders")

_HEX = "[0-9a-f]"
_DIGEST = f"^{_HEX}{{64}}$"
_INTEGER_LIMIT = 2**63

_UUID = f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$"
SenderId = Annotated[str, Path(pattern=_UUID, description="The sender's own UUID.")]
Uuid = Annotated[str, StringConstraints(pattern=_UUID)]
Digest = Annotated[str, Path(pattern=_DIGEST, description="The SHA-256 of the JSON of a vocabulary.")]
# A model may be served under the path of a folder.
Name = Annotated[str, StringConstraints(max_length=4096)]
Integer = Annotated[Whole, Field(ge=-_INTEGER_LIMIT, lt=_INTEGER_LIMIT)]
# Small enough that no sum of these is too large for a database.
Count = Annotated[
    # Given twice: the document has no limits of a number that may be written as 1.0.
    Whole, Field(ge=1, lt=2**31, json_schema_extra={"minimum": 1, "maximum": 2**31 - 1})
]


class Registration(Sent):
    """A process that will send generations. What is unknown is null."""

    model_config = example(
        host="gpu-1",
        pid=4304,
        started_at=1795454234000000000,
        version="0.1.0",
        vllm="0.32.0",
        model="Qwen/Qwen3-0.6B",
        vocabulary=None,
    )

    host: Name
    pid: Integer
    started_at: Integer
    version: Name = Field(description="Of agentlightning.")
    vllm: Name | None = Field(None, description="The version of vLLM.")
    model: Name | None = Field(None, description="The name that its model is served under.")
    vocabulary: str | None = Field(
        None, pattern=_DIGEST, description="Digest of its vocabulary, which gives the text of each token id."
    )


class Registered(BaseModel):
    """Result of a registration."""

    vocabulary: Literal["known", "wanted"] | None = Field(
        description="`wanted` asks the sender to send its vocabulary."
    )


class Vocabulary(BaseModel):
    """A stored vocabulary."""

    tokens: int = Field(description="Number of its ids.")


class StoreTime(Sent):
    """The time that the store answered with, and when its answer arrived by the sender's clock."""

    time: Integer
    received_at: Integer


class UnfinishedCalls(Sent):
    """Generations of one attempt that are under way; null ids where the calls named none."""

    rollout_id: Part | None
    attempt_id: Part | None
    count: Count


class LostCalls(Sent):
    """Generations of one attempt that could not be stored."""

    id: Uuid
    rollout_id: Part | None
    attempt_id: Part | None
    count: Count
    reason: Name


class Progress(Sent):
    """Progress of a sender: how far it has written what it records. Times are nanoseconds by its own clock."""

    model_config = example(
        watermark=1795454241500000000,
        store_time={"time": 1795454240250000000, "received_at": 1795454240251000000},
        under_way=[{"rollout_id": "ro-1", "attempt_id": "at-1", "count": 2}],
        lost=[],
        has_ended=False,
    )

    watermark: Integer = Field(description="All generations that had ended by then are stored, or counted as lost.")
    store_time: StoreTime | None = Field(None, description="The answer to the last report; null for the first one.")
    under_way: list[UnfinishedCalls] = Field([], max_length=UNFINISHED_LIMIT)
    lost: list[LostCalls] = Field([], max_length=UNFINISHED_LIMIT, description="Losses, each stored once by its id.")
    has_ended: bool = Field(False, description="The process writes nothing after this.")

    def as_record(self) -> records.Progress:
        found = self.model_dump()
        known = found.pop("store_time")
        return records.Progress(
            store_time=None if known is None else records.StoreTime(**known),
            under_way=[records.UnfinishedCalls(**each) for each in found.pop("under_way")],
            lost=[records.LostCalls(**each) for each in found.pop("lost")],
            **found,
        )


class Reported(BaseModel):
    """Answer to a report of progress."""

    time: int = Field(description="By the store's clock: the `store_time.time` of the next report.")


class Minute(BaseModel):
    """Generations written within a minute."""

    minute: int = Field(description="Since the epoch.")
    generations: int
    prompt_tokens: int
    output_tokens: int


class Sender(BaseModel):
    """A process that sends generations, and what it has written in the last hour."""

    id: str
    host: str
    pid: int
    started_at: int
    version: str
    vllm: str | None
    model: str | None
    vocabulary: str | None
    seen_at: int = Field(description="When the store last heard from it.")
    minutes: list[Minute] = Field(description="The minutes in which it has written, in order.")
    lag_mean: float | None = Field(
        description="Seconds from the end of a generation (sender's clock) to its arrival (store's clock)."
    )
    lag_max: float | None
    lost: int = Field(description="Generations that the sender reports it had to drop.")
    state: State | None = Field(
        description="`live` while it reports, `silent` if it stopped without a word, `ended` if it said that it ends."
    )
    watermark: int | None = Field(description="By its own clock: all that had ended by then is stored.")
    clock_difference: int | None = Field(description="Nanoseconds that the store's clock is ahead of the sender's.")
    under_way: int = Field(description="Generations that were unfinished at its watermark.")


class Senders(BaseModel):
    """Senders that the store heard from in the last hour, latest first, at most a hundred."""

    items: list[Sender]


@routes.put("/senders/{sender_id}", response_model=Registered, responses=errors())
async def put_sender(sender_id: SenderId, registration: Registration, database: Database) -> Response:
    """Register a process that will send generations."""
    told = registration.model_dump()
    digest = told.pop("vocabulary")
    sender = records.Sender(id=sender_id, **told)

    def register(connection: Connection) -> str | None:
        wanted = None if digest is None else bytes.fromhex(digest)
        senders.register_without_vocabulary(connection, sender, wanted)
        return None if wanted is None else "known" if senders.has_vocabulary(connection, wanted) else "wanted"

    return Json({"vocabulary": await database.write(register)})


@routes.put("/senders/{sender_id}/progress", response_model=Reported, responses=errors(404))
async def put_progress(sender_id: SenderId, progress: Progress, database: Database) -> Response:
    """Store up to which moment a sender has written everything that had ended, and which calls it answers now."""
    reported = progress.as_record()
    at = await database.write(lambda connection: senders.report_progress(connection, sender_id, reported))
    return Json({"time": at})


@routes.put(
    "/vocabularies/{digest}",
    response_model=Vocabulary,
    responses=errors(),
    openapi_extra={
        "requestBody": {"required": True, "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_vocabulary(digest: Digest, request: Request, database: Database) -> Response:
    """Store the text of each token id: `{"special":[ids],"tokens":[text or null]}`, compressed with zlib."""
    content_type = media_type(request)
    if content_type != BYTES:
        return sentence(415, f"a vocabulary has the content type {BYTES}; this body has {shown(content_type)}")
    body = await request.body()
    if len(body) > PACKED_LIMIT:
        return sentence(413, f"the vocabulary is larger than {PACKED_LIMIT >> 20} MiB")
    try:
        vocabulary = await database.run(lambda: _unpacked(body, digest))
    except ValueError as error:
        return sentence(422, f"the body is {error}")
    await database.write(lambda connection: senders.add_vocabulary(connection, bytes.fromhex(digest), body))
    return Json({"tokens": len(vocabulary.tokens)})


@routes.get("/senders", response_model=Senders, responses=errors())
async def query_senders(database: Database) -> Response:
    """List the processes that have sent generations in the last hour, how many, and how late."""
    since = time.time_ns() - HOUR

    def read(connection: Connection) -> list[dict[str, Any]]:
        known = {each.sender_id: each for each in watermarks.all_of(connection)}
        return [_item(each, known.get(each.sender.id)) for each in senders.recent(connection, since)]

    return Json({"items": await database.read(read)})


def _unpacked(body: bytes, digest: str) -> records.Vocabulary:
    found = records.Vocabulary.from_bytes(body)
    if found.digest.hex() != digest:
        raise ValueError(f"a vocabulary of another digest: {found.digest.hex()}")
    return found


def _item(seen: senders.SenderReport, progress: Watermark | None) -> dict[str, Any]:
    sender, minutes = seen.sender, seen.minutes
    count = sum(each.generations for each in minutes)
    return {
        "id": sender.id,
        "host": sender.host,
        "pid": sender.pid,
        "started_at": sender.started_at,
        "version": sender.version,
        "vllm": sender.vllm,
        "model": sender.model,
        "vocabulary": None if seen.vocabulary_digest is None else seen.vocabulary_digest.hex(),
        "seen_at": seen.seen_at,
        "minutes": [
            {name: getattr(each, name) for name in ("minute", "generations", "prompt_tokens", "output_tokens")}
            for each in minutes
        ],
        "lag_mean": sum(each.lag_sum for each in minutes) / count / 1e9 if count else None,
        "lag_max": max(each.lag_max for each in minutes) / 1e9 if count else None,
        "lost": seen.lost,
        "state": None if progress is None else progress.state,
        "watermark": None if progress is None else progress.watermark,
        "clock_difference": None if progress is None else progress.clock_difference,
        "under_way": 0 if progress is None else sum(each.count for each in progress.under_way),
    }
