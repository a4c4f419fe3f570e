"""Who writes generations, how much and how late, and what their token ids stand for.

Everything here works inside a transaction of somebody else's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from agentlightning.generation import Generation
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import rows, tables
from agentlightning.store.database import insert_if_new, run

__all__ = [
    "Minute",
    "Seen",
    "add_vocabulary",
    "greet",
    "has_vocabulary",
    "introduce",
    "is_known",
    "note",
    "recent",
    "vocabulary",
    "vocabulary_digest_of",
    "vocabulary_of",
]

SECOND = 10**9
MINUTE = 60 * SECOND
MINUTES_KEPT = 24 * 60

_SENDERS, _MINUTES, _LOSSES = tables.senders.c, tables.sender_minutes.c, tables.losses.c
_GENERATIONS, _VOCABULARIES = tables.generations.c, tables.vocabularies.c
_COUNT = """
    INSERT INTO sender_minutes VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sender_key, minute) DO UPDATE SET
    generations = sender_minutes.generations + excluded.generations,
    prompt_tokens = sender_minutes.prompt_tokens + excluded.prompt_tokens,
    output_tokens = sender_minutes.output_tokens + excluded.output_tokens,
    lag_sum = sender_minutes.lag_sum + excluded.lag_sum,
    lag_max = CASE WHEN excluded.lag_max > sender_minutes.lag_max THEN excluded.lag_max ELSE sender_minutes.lag_max END
"""


@dataclass(frozen=True, slots=True)
class Minute:
    """What was written in a minute.

    Attributes:
        minute: which, since the epoch.
        generations, prompt_tokens, output_tokens: how many.
        lag_sum, lag_max: of all, and the most, how many nanoseconds after it had finished it was written.
    """

    minute: int
    generations: int
    prompt_tokens: int
    output_tokens: int
    lag_sum: float
    lag_max: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A sender, and what was seen of it.

    Attributes:
        sender: without its vocabulary.
        vocabulary_digest: that of its vocabulary, which may not be here yet.
        seen_at: when something was heard of it last, to the second, in nanoseconds since the epoch.
        minutes: those in which it has written something, in order.
        lost: how many generations it could not have kept, as it has told.
    """

    sender: Sender
    vocabulary_digest: bytes | None
    seen_at: int
    minutes: Sequence[Minute]
    lost: int


def greet(connection: Connection, sender: Sender) -> None:
    """Note who will write, and keep its vocabulary where it is not known yet. May be told again, and otherwise.

    Raises:
        ValueError: its id is no UUID.
    """
    vocabulary = sender.vocabulary
    introduce(connection, sender, None if vocabulary is None else vocabulary.digest)
    if vocabulary is not None and not has_vocabulary(connection, vocabulary.digest):
        add_vocabulary(connection, vocabulary.digest, vocabulary.to_bytes())


def introduce(connection: Connection, sender: Sender, vocabulary_digest: bytes | None) -> None:
    """The same for one whose vocabulary is somewhere else, or comes later."""
    wanted = rows.uuid_bytes(sender.id)
    columns = {
        "host": rows.storable(sender.host),
        "pid": sender.pid,
        "started_at": sender.started_at,
        "version": rows.storable(sender.version),
        "vllm": rows.storable(sender.vllm),
        "model": rows.storable(sender.model),
        "digest": vocabulary_digest,
        "seen_at": time.time_ns(),
    }
    if not insert_if_new(connection, tables.senders, id=wanted, **columns):
        connection.execute(update(tables.senders).where(_SENDERS.id == wanted).values(**columns))


def is_known(connection: Connection, sender_id: str | None) -> bool:
    """Whether it has greeted."""
    return _find(connection, sender_id) is not None


def has_vocabulary(connection: Connection, digest: bytes) -> bool:
    """Whether the vocabulary of this digest is kept."""
    return connection.execute(select(_VOCABULARIES.digest).where(_VOCABULARIES.digest == digest)).first() is not None


def add_vocabulary(connection: Connection, digest: bytes, packed: bytes) -> None:
    """Keep a vocabulary, as `Vocabulary.to_bytes` has it; one that is known is left as it is."""
    insert_if_new(connection, tables.vocabularies, digest=digest, body=packed)


def note(
    connection: Connection,
    sender_id: str | None,
    new: Collection[Generation],
    counts: Collection[tuple[int, int]],
    now: int,
) -> int | None:
    """Note that a sender has written generations; returns its key, and None of one that has never greeted.

    Args:
        counts: how many ids each of them has, its prompt and all of its choices.
        now: nanoseconds since the epoch.
    """
    known = _find(connection, sender_id)
    if known is None or not new:
        return None if known is None else known[0]
    key, seen_at = known
    minute, (prompts, outputs) = now // MINUTE, map(sum, zip(*counts, strict=True))
    lags = [now - generation.finished_at for generation in new]
    if min(lags) < 0:
        # The clock that has said when it finished is ahead of ours.
        lags = [max(lag, 0) for lag in lags]
    run(connection, _COUNT, (key, minute, len(new), prompts, outputs, float(sum(lags)), float(max(lags))))
    # Not more often: of who writes all the time it is no news.
    if now - seen_at >= SECOND:
        run(connection, "UPDATE senders SET seen_at = ? WHERE key = ?", (now, key))
    if seen_at // MINUTE != minute:
        old = _MINUTES.minute < minute - MINUTES_KEPT
        connection.execute(tables.sender_minutes.delete().where(_MINUTES.sender_key == key, old))
    return key


def recent(connection: Connection, since: int, limit: int = 100) -> list[Seen]:
    """The senders that something was heard of since then, at most so many, from the last one seen on.

    Args:
        since: nanoseconds since the epoch; minutes and losses are from then on, too.
    """
    query = select(tables.senders).where(_SENDERS.seen_at >= since).order_by(_SENDERS.seen_at.desc()).limit(limit)
    found = connection.execute(query).all()
    minutes: defaultdict[int, list[Minute]] = defaultdict(list)
    of_these = _MINUTES.sender_key.in_([row.key for row in found]), _MINUTES.minute >= since // MINUTE
    for row in connection.execute(select(tables.sender_minutes).where(*of_these).order_by(_MINUTES.minute)):
        minutes[row.sender_key].append(Minute(*row[1:]))
    lost = _lost(connection, found, since)
    return [Seen(_sender_of(row), row.digest, row.seen_at, minutes[row.key], lost[row.key]) for row in found]


def vocabulary_of(connection: Connection, generation_id: str) -> Vocabulary | None:
    """What the ids of a generation stand for; None where nobody has told."""
    digest = vocabulary_digest_of(connection, generation_id)
    return None if digest is None else vocabulary(connection, digest)


def vocabulary_digest_of(connection: Connection, generation_id: str) -> bytes | None:
    """The digest of the vocabulary of a generation; None where there is none here."""
    query = (
        select(_VOCABULARIES.digest)
        .join(tables.senders, _SENDERS.digest == _VOCABULARIES.digest)
        .join(tables.generations, _GENERATIONS.sender_key == _SENDERS.key)
    )
    with suppress(ValueError):
        return connection.execute(query.where(_GENERATIONS.id == rows.uuid_bytes(generation_id))).scalar()
    return None


def vocabulary(connection: Connection, digest: bytes) -> Vocabulary | None:
    """The vocabulary of this digest; None where it is not kept."""
    packed = connection.execute(select(_VOCABULARIES.body).where(_VOCABULARIES.digest == digest)).scalar()
    return None if packed is None else Vocabulary.from_bytes(packed)


def _find(connection: Connection, sender_id: str | None) -> tuple[int, int] | None:
    """The key of a sender, and when it was seen."""
    with suppress(ValueError):
        if sender_id is not None:
            query = "SELECT key, seen_at FROM senders WHERE id = ?"
            row = run(connection, query, [rows.uuid_bytes(sender_id)]).first()
            return None if row is None else (row.key, row.seen_at)
    return None


def _lost(connection: Connection, found: Sequence[Any], since: int) -> defaultdict[int, int]:
    """How many each of these senders has lost, by its key.

    In a container that is started again the next sender has the same host and process number as the one before it.
    """
    processes: defaultdict[tuple[str, int], list[Any]] = defaultdict(list)
    for row in sorted(found, key=lambda row: row.started_at, reverse=True):
        processes[row.host, row.pid].append(row)
    lost: defaultdict[int, int] = defaultdict(int)
    for loss in connection.execute(select(tables.losses).where(_LOSSES.last_at >= since)):
        for row in processes[loss.host, loss.pid]:
            if row.started_at <= loss.last_at:
                lost[row.key] += loss._mapping["count"]
                break
    return lost


def _sender_of(row: Any) -> Sender:
    return Sender(
        id=rows.uuid_text(row.id),
        host=rows.text_of(row.host),
        pid=row.pid,
        started_at=row.started_at,
        version=rows.text_of(row.version),
        vllm=rows.text_of(row.vllm),
        model=rows.text_of(row.model),
    )
