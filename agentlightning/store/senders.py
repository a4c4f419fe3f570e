"""Senders: the processes that write generations, how much and how late, and the vocabularies of their token ids.

The caller owns the transaction.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.generation import Generation
from agentlightning.sender import Progress, Sender, Vocabulary
from agentlightning.store import rows, tables, watermarks
from agentlightning.store.database import change, found, insert_if_new

__all__ = [
    "Minute",
    "SenderReport",
    "add_vocabulary",
    "count_generations",
    "has_vocabulary",
    "is_known",
    "recent",
    "register",
    "register_without_vocabulary",
    "report_progress",
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
    """Counts of what a sender wrote in a minute.

    Attributes:
        minute: minutes since the epoch.
        lag_sum, lag_max: sum and maximum of the nanoseconds from the end of a generation (sender's clock) to its
            arrival (store's clock).
    """

    minute: int
    generations: int
    prompt_tokens: int
    output_tokens: int
    lag_sum: float
    lag_max: float


@dataclass(frozen=True, slots=True)
class SenderReport:
    """A sender and its recent activity.

    Attributes:
        sender: without its vocabulary.
        vocabulary_digest: digest of its vocabulary, which may not have arrived yet.
        seen_at: when it last registered or wrote, to the second, in nanoseconds since the epoch.
        minutes: the minutes in which it wrote something, in order.
        lost: number of generations that it reported as lost.
    """

    sender: Sender
    vocabulary_digest: bytes | None
    seen_at: int
    minutes: Sequence[Minute]
    lost: int


def register(connection: Connection, sender: Sender) -> None:
    """Register a sender, and store its vocabulary unless it is known. Safe to repeat; the last call wins.

    Raises:
        ValueError: its id is not a UUID.
    """
    vocabulary = sender.vocabulary
    register_without_vocabulary(connection, sender, None if vocabulary is None else vocabulary.digest)
    if vocabulary is not None and not has_vocabulary(connection, vocabulary.digest):
        add_vocabulary(connection, vocabulary.digest, vocabulary.to_bytes())


def register_without_vocabulary(connection: Connection, sender: Sender, vocabulary_digest: bytes | None) -> None:
    """Register a sender whose vocabulary is stored already, or comes later."""
    sender_id = rows.uuid_bytes(sender.id)
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
    if not insert_if_new(connection, tables.senders, id=sender_id, **columns):
        connection.execute(update(tables.senders).where(_SENDERS.id == sender_id).values(**columns))
    if (known := _find(connection, sender.id)) is not None:
        watermarks.register(connection, known[0])


def report_progress(connection: Connection, sender_id: str, progress: Progress) -> int:
    """Store how far a sender has written; returns the store's time, in nanoseconds since the epoch.

    Raises:
        NotFound: the sender is not registered.
        InvalidRecord: the id of a loss is not a UUID.
    """
    known = _find(connection, sender_id)
    if known is None:
        raise NotFound(f"the sender {sender_id!r} is not registered")
    key, seen_at = known
    _note_seen(connection, key, seen_at, time.time_ns())
    return watermarks.report(connection, key, progress)


def is_known(connection: Connection, sender_id: str | None) -> bool:
    """Tell whether a sender is registered."""
    return _find(connection, sender_id) is not None


def has_vocabulary(connection: Connection, digest: bytes) -> bool:
    """Tell whether the vocabulary with this digest is stored."""
    return connection.execute(select(_VOCABULARIES.digest).where(_VOCABULARIES.digest == digest)).first() is not None


def add_vocabulary(connection: Connection, digest: bytes, packed: bytes) -> None:
    """Store a vocabulary, packed by `Vocabulary.to_bytes`; a known one is left unchanged."""
    insert_if_new(connection, tables.vocabularies, digest=digest, body=packed)


def count_generations(
    connection: Connection,
    sender_id: str | None,
    new: Collection[Generation],
    prompt_tokens: Iterable[int],
    output_tokens: Iterable[int],
    now: int,
) -> int | None:
    """Add new generations to the counts of their sender; returns its key, or None for an unregistered sender.

    Args:
        prompt_tokens, output_tokens: the numbers of ids of each generation's prompt and choices.
        now: nanoseconds since the epoch.
    """
    known = _find(connection, sender_id)
    if known is None or not new:
        return None if known is None else known[0]
    key, seen_at = known
    prompts, outputs = sum(prompt_tokens), sum(output_tokens)
    lags = [now - generation.finished_at for generation in new]
    if min(lags) < 0:
        # The sender's clock is ahead of the store's.
        lags = [max(lag, 0) for lag in lags]
    change(connection, _COUNT, (key, now // MINUTE, len(new), prompts, outputs, float(sum(lags)), float(max(lags))))
    _note_seen(connection, key, seen_at, now)
    return key


def recent(connection: Connection, since: int, limit: int = 100) -> list[SenderReport]:
    """Report on the senders that registered or wrote lately, the latest first.

    Args:
        since: nanoseconds since the epoch, for the minutes and losses, too.
        limit: most senders to report on.
    """
    query = select(tables.senders).where(_SENDERS.seen_at >= since).order_by(_SENDERS.seen_at.desc()).limit(limit)
    found = connection.execute(query).all()
    minutes: defaultdict[int, list[Minute]] = defaultdict(list)
    of_these = _MINUTES.sender_key.in_([row.key for row in found]), _MINUTES.minute >= since // MINUTE
    for row in connection.execute(select(tables.sender_minutes).where(*of_these).order_by(_MINUTES.minute)):
        minutes[row.sender_key].append(Minute(*row[1:]))
    lost = _lost(connection, found, since)
    return [SenderReport(_sender_of(row), row.digest, row.seen_at, minutes[row.key], lost[row.key]) for row in found]


def vocabulary_of(connection: Connection, generation_id: str) -> Vocabulary | None:
    """Find the vocabulary of a generation; None where its sender gave none."""
    digest = vocabulary_digest_of(connection, generation_id)
    return None if digest is None else vocabulary(connection, digest)


def vocabulary_digest_of(connection: Connection, generation_id: str) -> bytes | None:
    """Find the digest of a generation's vocabulary; None where none is stored."""
    query = (
        select(_VOCABULARIES.digest)
        .join(tables.senders, _SENDERS.digest == _VOCABULARIES.digest)
        .join(tables.generations, _GENERATIONS.sender_key == _SENDERS.key)
    )
    with suppress(InvalidRecord):
        return connection.execute(query.where(_GENERATIONS.id == rows.uuid_bytes(generation_id))).scalar()
    return None


def vocabulary(connection: Connection, digest: bytes) -> Vocabulary | None:
    """Read the vocabulary with this digest; None where it is not stored."""
    packed = connection.execute(select(_VOCABULARIES.body).where(_VOCABULARIES.digest == digest)).scalar()
    return None if packed is None else Vocabulary.from_bytes(packed)


def _find(connection: Connection, sender_id: str | None) -> tuple[int, int] | None:
    """Find the key of a sender, and when it was last seen."""
    with suppress(InvalidRecord):
        if sender_id is not None:
            for key, seen_at in found(
                connection, tables.senders, ("key", "seen_at"), "id", [rows.uuid_bytes(sender_id)]
            ):
                return key, seen_at
    return None


def _note_seen(connection: Connection, key: int, seen_at: int, now: int) -> None:
    """Note that a sender was heard from, and forget its minutes of yesterday."""
    # At most once a second: a sender that writes all the time needs no update with every write.
    if now - seen_at >= SECOND:
        change(connection, "UPDATE senders SET seen_at = ? WHERE key = ?", (now, key))
    if seen_at // MINUTE != now // MINUTE:
        old = _MINUTES.minute < now // MINUTE - MINUTES_KEPT
        connection.execute(tables.sender_minutes.delete().where(_MINUTES.sender_key == key, old))


def _lost(connection: Connection, found: Sequence[Any], since: int) -> defaultdict[int, int]:
    """Count the losses of each of these senders, by its key.

    In a restarted container the next sender has the same host and process id as the one before; the start time tells
    them apart.
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
