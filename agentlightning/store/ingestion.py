"""Spans on their way into the store, with what they mean for attempts and sessions. The caller owns the transaction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.rollout_records import Span, with_ids
from agentlightning.store import attributes, lifecycle, rollouts, sessions, spans, triplets
from agentlightning.store.database import now
from agentlightning.store.spans import NewSpan, new_span

__all__ = ["Mixed", "add_reward", "add_spans", "annotate", "ingest"]


class Mixed(Exception):
    """Raised where several are written together and the outcomes differ: each of them is to be written alone."""


def add_spans(connection: Connection, received: Sequence[NewSpan]) -> list[NewSpan | None]:
    """Store spans of attempts, each of which is a sign of life of its attempt.

    Returns:
        The spans with their `sequence_id`; None for one that was stored before.

    Raises:
        NotFound: there is no such attempt as one of them names.
        Mixed: some were stored before.
    """
    new = [replace(each) for each in received]
    named = [(each.rollout_id or "", each.attempt_id or "") for each in new]
    for (rollout_id, attempt_id), is_there in zip(named, lifecycle.heartbeats(connection, named), strict=True):
        if not is_there:
            raise NotFound(f"there is no attempt {attempt_id!r} of a rollout {rollout_id!r}")
    stored = spans.add(connection, new)
    if stored == len(new):
        return [*new]
    if len(new) > 1:
        raise Mixed("some of the spans were stored before")
    return [None]


def add_reward(
    connection: Connection, rollout_id: str, attempt_id: str, value: float, generation_id: str | None
) -> NewSpan:
    """Reward an attempt or one of its calls, by the span that `emit_reward` of Agent Lightning 0.3 would make.

    Args:
        rollout_id: a rollout that was created here, or one that has only been recorded.
        attempt_id: `latest` for the latest.
        generation_id: the call; None for the last call of the attempt, whichever that is when triplets are read.

    Raises:
        InvalidRecord: the value is infinite or not a number.
        NotFound: no such attempt, or the generation is not one of the rollout's calls.
    """
    found = rollouts.attempt_id_of(connection, rollout_id, attempt_id)
    if found is None or not lifecycle.heartbeat(connection, rollout_id, found):
        found = _recorded_attempt(connection, rollout_id, attempt_id)
    return _annotated(connection, rollout_id, found, value, generation_id, None)


def annotate(
    connection: Connection,
    rollout_id: str,
    attempt_id: str,
    value: float | None,
    generation_id: str | None,
    note: str | None,
) -> NewSpan:
    """Reward an attempt or one of its calls in the name of a person, or note something about it.

    That is the same span as `add_reward` makes, but no sign of life of the attempt.

    Args:
        value: None for a note alone.
        note: None for a reward alone.

    Raises:
        InvalidRecord, NotFound: as for `add_reward`.
    """
    found = rollouts.attempt_id_of(connection, rollout_id, attempt_id)
    if found is None or rollouts.find_attempt(connection, rollout_id, found) is None:
        found = _recorded_attempt(connection, rollout_id, attempt_id)
    return _annotated(connection, rollout_id, found, value, generation_id, note)


def _recorded_attempt(connection: Connection, rollout_id: str, attempt_id: str) -> str:
    """Return an attempt of a rollout that has only been recorded; its id is empty where its calls name none."""
    is_created = rollouts.find(connection, rollout_id) is not None
    found = None if is_created else triplets.recorded_attempt(connection, rollout_id, attempt_id)
    if found is None:
        raise NotFound(f"there is no attempt {attempt_id!r} of a rollout {rollout_id!r}")
    return found


def _annotated(
    connection: Connection,
    rollout_id: str,
    attempt_id: str,
    value: float | None,
    generation_id: str | None,
    note: str | None,
) -> NewSpan:
    if value is not None and not math.isfinite(value):
        raise InvalidRecord(f"value: a reward must be a finite number, not {value}")
    if generation_id is not None and not triplets.has_call(connection, rollout_id, generation_id):
        raise NotFound(f"there is no generation {generation_id!r} of the rollout {rollout_id!r}")
    at = now(connection)
    given = attributes.reward_attributes(value, generation_id, note)
    reward = with_ids(
        Span(attributes.ANNOTATION, rollout_id, attempt_id, attributes=given, start_time=at, end_time=at).as_dict()
    )
    ids = {"trace_id": reward["trace_id"], "span_id": reward["span_id"]}
    new = new_span({**reward, "context": {**ids, "is_remote": False, "trace_state": {}}})
    spans.add(connection, [new])
    return new


def ingest(connection: Connection, received: Sequence[NewSpan], project_id: str | None) -> int:
    """Store spans from an exporter of OpenTelemetry; returns how many are new.

    Spans of rollouts that this store does not know are stored as well.

    Args:
        received: spans, which are not changed: a transaction that is run again begins with them as they are.
        project_id: the AgentOps project that they were sent to; their traces are sessions then.
    """
    # `latest` stands for the latest attempt, as no attempt id does.
    new = [replace(each, attempt_id=None if each.attempt_id == "latest" else each.attempt_id) for each in received]
    spans.place_again(connection, new)
    attempts: dict[tuple[str, str], str] = {}
    for each in new:
        if each.rollout_id is not None:
            named = (each.rollout_id, each.attempt_id or "")
            if named not in attempts:
                attempts[named] = rollouts.attempt_id_of(connection, *named) or ""
            each.attempt_id = attempts[named]
    own = {} if project_id is None else sessions.join(connection, new, project_id)
    alive: set[Any] = {(each.rollout_id, each.attempt_id or "") for each in new if each.rollout_id is not None}
    lifecycle.heartbeats(connection, sorted(alive))
    stored = spans.add(connection, new)
    sessions.end(connection, new, own)
    return stored
