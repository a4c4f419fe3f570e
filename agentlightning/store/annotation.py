"""Rewards and notes of a rollout, as its spans have them. The caller owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, func, or_, select

from agentlightning.store.attributes import ANNOTATION, GENERATION, NOTE, OUTCOME
from agentlightning.store.rows import storable
from agentlightning.store.tables import ATTEMPT_OF_SPAN, spans

__all__ = ["Annotation", "of_rollout"]

# Bytes of a span: those of agents may have anything in them.
LARGEST_READ = 64 << 10


@dataclass(frozen=True, slots=True)
class Annotation:
    """A reward, a note, or both.

    Attributes:
        at: seconds since the epoch.
        generation_id: the call that it names; None where it names none.
        is_outcome: whether it was given for an attempt.
    """

    at: float | None
    name: str
    attempt_id: str | None
    reward: float | None
    note: str | None
    generation_id: str | None
    is_outcome: bool


def of_rollout(connection: Connection, rollout_id: str, limit: int) -> list[Annotation]:
    """List the last rewards and notes of a rollout, the latest first."""
    body = case((func.length(spans.c.body) <= LARGEST_READ, spans.c.body)).label("body")
    query = (
        select(spans.c.name, ATTEMPT_OF_SPAN, spans.c.start_time, spans.c.end_time, spans.c.reward, body)
        .where(spans.c.rollout_id == storable(rollout_id))
        .where(or_(spans.c.reward.is_not(None), spans.c.name == ANNOTATION))
        .order_by(spans.c.sequence_id.desc(), spans.c.key.desc())
        .limit(limit)
    )
    return [_annotation(row) for row in connection.execute(query)]


def _annotation(row: Any) -> Annotation:
    known: Mapping[str, Any] = {} if row.body is None else json.loads(row.body)["attributes"]
    note, generation_id = known.get(NOTE), known.get(GENERATION)
    return Annotation(
        at=row.start_time if row.end_time is None else row.end_time,
        name=row.name,
        attempt_id=row.attempt_id,
        reward=row.reward,
        note=note if isinstance(note, str) else None,
        generation_id=None if generation_id is None else str(generation_id),
        is_outcome=known.get(OUTCOME) is True,
    )
