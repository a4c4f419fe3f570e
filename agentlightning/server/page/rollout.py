"""The page of one rollout: its header, attempts, rewards and notes, timeline and conversation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from agentlightning.server.page.conversation import conversation_of
from agentlightning.server.page.rollout_table import absence_of, progress_of
from agentlightning.server.page.timeline import timeline_of
from agentlightning.store import annotation, changes, neighbours, rollouts
from agentlightning.store.summaries import task_of
from agentlightning.store.transcript import Outline, Position

__all__ = ["AttemptRow", "attempt_rows", "rollout_values", "state_of"]

ANNOTATIONS_SHOWN = 100
INPUT_CHARACTERS = 200_000
# The page says so exactly how long a rollout has taken so far.
SECONDS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt in the header.

    Attributes:
        attempt_id: None for the calls that name none.
        number: None for an attempt that is known only from its calls and spans.
        reward: its final reward.
        seconds: how long it took; None if unknown, or if it has not ended.
    """

    attempt_id: str | None
    number: int | None
    status: str | None
    worker: str | None
    calls: int
    prompt_tokens: int
    output_tokens: int
    reward: float | None
    seconds: float | None


def rollout_values(connection: Connection, rollout_id: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values for the template of a rollout; None if nothing is known of it.

    Args:
        wanted: what the calls to show say of their callers, by field.
    """
    # First: what comes in between is shown, and makes another state.
    state = state_of(connection, rollout_id)
    found = rollouts.find(connection, rollout_id)
    conversation = conversation_of(connection, rollout_id, wanted)
    calls = conversation.calls
    timeline = timeline_of(connection, rollout_id, found, calls)
    if found is None and not timeline.rows:
        return None
    attempts = attempt_rows(connection, found, conversation.outline)
    has_answers = any(call.status == "finished" for call in calls)
    return {
        "state": state,
        "calls": conversation.matching,
        "callers": conversation.callers,
        "wanted": wanted,
        "count": conversation.count,
        "more_calls": conversation.left_out,
        "timeline": timeline,
        "rollout": found,
        "input_shown": INPUT_CHARACTERS,
        "task": None if found is None else task_of(found.input),
        "attempts": attempts,
        "reward": _reward(attempts),
        "workers": _distinct(each.worker for each in attempts),
        "models": _distinct(call.model for call in calls),
        "versions": _distinct(version for call in calls for version in call.versions),
        "annotations": annotation.of_rollout(connection, rollout_id, ANNOTATIONS_SHOWN),
        "beside": neighbours.neighbours_of(connection, rollout_id, found),
        "absence": None if has_answers else absence_of(connection, rollout_id, found),
        "progress": progress_of(connection, rollout_id, found, calls),
    }


def state_of(connection: Connection, rollout_id: str) -> str:
    """Return a mark of all that the page of a rollout shows: as long as it stays, so does the page."""
    row = rollouts.find(connection, rollout_id)
    # One that has not ended takes longer all the time.
    now = None if row is None or row.end_time is not None else int(time.time()) // SECONDS_SHOWN
    return f"{changes.revision_of(connection, rollout_id)}.{now or ''}"


def attempt_rows(connection: Connection, rollout: Any | None, outline: Outline) -> list[AttemptRow]:
    """List the attempts of a rollout: those of the queue, then those that only its calls and rewards name."""
    known = {} if rollout is None else {each.attempt_id: each for each in rollouts.attempts_of(connection, rollout.key)}
    found: list[AttemptRow] = []
    by_attempt: defaultdict[str | None, list[Position]] = defaultdict(list)
    for each in outline.positions:
        by_attempt[each.attempt_id or None].append(each)
    for attempt_id in dict.fromkeys([*known, *outline.rewards]):
        row, calls = known.get(attempt_id), by_attempt[attempt_id]
        ended = None if row is None else row.end_time
        found.append(
            AttemptRow(
                attempt_id=attempt_id,
                number=None if row is None else row.sequence_id,
                status=None if row is None else row.status,
                worker=None if row is None else row.worker_id,
                calls=len(calls),
                prompt_tokens=sum(each.prompt_tokens for each in calls),
                output_tokens=sum(each.output_tokens for each in calls),
                reward=outline.rewards.get(attempt_id),
                seconds=None if row is None or ended is None else max(ended - row.start_time, 0.0),
            )
        )
    return found


def _reward(attempts: Sequence[AttemptRow]) -> float | None:
    """Return the reward of the latest attempt of the queue, or else the last one that is known."""
    queued = [each for each in attempts if each.number is not None]
    if queued:
        return queued[-1].reward
    return next((each.reward for each in reversed(attempts) if each.reward is not None), None)


def _distinct(values: Any) -> Sequence[str]:
    return [each for each in dict.fromkeys(values) if each]
