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
from agentlightning.server.schemas import Sent, Whole, example
from agentlightning.store import senders

__all__ = ["routes"]

HOUR = 3600 * 10**9
BYTES = "application/octet-stream"

routes = router("senders")

_HEX = "[0-9a-f]"
_DIGEST = f"^{_HEX}{{64}}$"
_INTEGER_LIMIT = 2**63

SenderId = Annotated[
    str,
    Path(
        pattern=f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$", description="The sender's own UUID."
    ),
]
Digest = Annotated[str, Path(pattern=_DIGEST, description="The SHA-256 of the JSON of a vocabulary.")]
# A model may be served under the path of a folder.
Name = Annotated[str, StringConstraints(max_length=4096)]
Integer = Annotated[Whole, Field(ge=-_INTEGER_LIMIT, lt=_INTEGER_LIMIT)]


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
    found = await database.read(lambda connection: senders.recent(connection, since))
    return Json({"items": [_item(each) for each in found]})


def _unpacked(body: bytes, digest: str) -> records.Vocabulary:
    found = records.Vocabulary.from_bytes(body)
    if found.digest.hex() != digest:
        raise ValueError(f"a vocabulary of another digest: {found.digest.hex()}")
    return found


def _item(seen: senders.SenderReport) -> dict[str, Any]:
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
    }
