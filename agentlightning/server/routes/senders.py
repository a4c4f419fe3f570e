"""Who writes generations: vLLM servers say so before they do, and whoever watches them asks here."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response
from sqlalchemy import Connection

from agentlightning.sender import PACKED_LIMIT, Sender, Vocabulary
from agentlightning.server.answers import Json
from agentlightning.server.decoding import header
from agentlightning.server.errors import sentence
from agentlightning.server.models import senders as models
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import senders

__all__ = ["routes"]

HOUR = 3600 * 10**9
BYTES = "application/octet-stream"

routes = router("senders")


@routes.put("/senders/{sender_id}", response_model=models.Greeted, responses=errors())
async def put_sender(sender_id: models.SenderId, greeting: models.Greeting, database: Database) -> Response:
    """Note who will write generations."""
    told = greeting.model_dump()
    digest = told.pop("vocabulary")
    sender = Sender(id=sender_id, **told)

    def greet(connection: Connection) -> str | None:
        wanted = None if digest is None else bytes.fromhex(digest)
        senders.introduce(connection, sender, wanted)
        return None if wanted is None else "known" if senders.has_vocabulary(connection, wanted) else "wanted"

    return Json({"vocabulary": await database.write(greet)})


@routes.put(
    "/vocabularies/{digest}",
    response_model=models.Vocabulary,
    responses=errors(),
    openapi_extra={
        "requestBody": {"required": True, "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_vocabulary(digest: models.Digest, request: Request, database: Database) -> Response:
    """Keep what token ids stand for: `{"special":[ids],"tokens":[text or null]}`, packed with zlib."""
    content_type = (header(request.scope, "content-type") or "").partition(";")[0].strip().lower()
    if content_type != BYTES:
        found = repr(content_type[:100]) if content_type else "without a Content-Type"
        return sentence(415, f"a vocabulary comes as {BYTES}, and this is {found}")
    body = await request.body()
    if len(body) > PACKED_LIMIT:
        return sentence(413, f"the vocabulary is larger than {PACKED_LIMIT >> 20} MiB")
    try:
        vocabulary = await database.run(lambda: _unpacked(body, digest))
    except ValueError as error:
        return sentence(422, f"the body is {error}")
    await database.write(lambda connection: senders.add_vocabulary(connection, bytes.fromhex(digest), body))
    return Json({"tokens": len(vocabulary.tokens)})


@routes.get("/senders", response_model=models.Senders, responses=errors())
async def query_senders(database: Database) -> Response:
    """Who has written generations in the last hour, how many, and how late."""
    since = time.time_ns() - HOUR
    found = await database.read(lambda connection: senders.recent(connection, since))
    return Json({"items": [_item(each) for each in found]})


def _unpacked(body: bytes, digest: str) -> Vocabulary:
    found = Vocabulary.from_bytes(body)
    if found.digest.hex() != digest:
        raise ValueError(f"a vocabulary of another digest: {found.digest.hex()}")
    return found


def _item(seen: senders.Seen) -> dict[str, Any]:
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
