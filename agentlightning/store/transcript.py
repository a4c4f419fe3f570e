"""The calls of a rollout as texts, for people to read: without ids, and in few queries however many calls there are.

The caller owns the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from agentlightning.generation import STATUSES, Status
from agentlightning.store import prompts, rows, tables, texts
from agentlightning.store.triplets import CALLER, caller_of, calls_of

__all__ = ["AnswerText", "CallText", "Outline", "Position", "latest_unassigned", "outline_of", "read"]

BYTES_OF_AN_ID = 4
CALLS_AT_ONCE = 50

_GENERATIONS, _CHOICES = tables.generations.c, tables.choices.c
_COUNTS = (_GENERATIONS.prompt_tokens, _GENERATIONS.output_tokens)
_CALL = select(
    *(_GENERATIONS.key, _GENERATIONS.id, _GENERATIONS.endpoint_key, _GENERATIONS.model_key, _GENERATIONS.attempt_key),
    *(_GENERATIONS.status, _GENERATIONS.started_at, _GENERATIONS.finished_at, *CALLER, *_COUNTS),
    *(_GENERATIONS.prompt_text, _GENERATIONS.text_block),
)
_ANSWER = select(
    *(_CHOICES.generation_key, _CHOICES.index, _CHOICES.text, _CHOICES.finish_reason_key, _CHOICES.weight_versions),
    # A database knows the length of a value without reading the value.
    func.length(_CHOICES.token_ids).label("bytes"),
).order_by(_CHOICES.generation_key, _CHOICES.index)


@dataclass(frozen=True, slots=True)
class Position:
    """A generation of a rollout's call, with what is known of it besides its contents.

    Attributes:
        key: its key in the database.
        span_id: the span that names its answer.
        caller: what it says of its caller, by the names of the fields.
    """

    key: int
    id: str
    attempt_id: str | None
    span_id: str | None
    reward: float | None
    caller: Mapping[str, Any]
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Outline:
    """The generations of a rollout's calls, in the order of its triplets.

    Attributes:
        rewards: the final reward of each attempt that these or the rewards name, None for those that name none.
    """

    positions: Sequence[Position]
    rewards: Mapping[str | None, float | None]


@dataclass(frozen=True, slots=True)
class AnswerText:
    """One of the answers to a prompt; `text` is None if no text is kept, `versions` those of its weights."""

    index: int
    text: str | None
    tokens: int
    finish_reason: str | None
    versions: Sequence[str]


@dataclass(frozen=True, slots=True)
class CallText:
    """A generation without its ids; times are nanoseconds since the epoch."""

    key: int
    id: str
    attempt_id: str | None
    endpoint: str | None
    model: str | None
    status: Status
    started_at: int | None
    finished_at: int
    caller: Mapping[str, Any]
    prompt_tokens: int
    prompt: str | None
    answers: Sequence[AnswerText]


def outline_of(connection: Connection, rollout_id: str) -> Outline:
    """List the generations of a rollout's calls, by the rules of triplets, without their contents."""
    found = calls_of(connection, rollout_id, None, (*CALLER, *_COUNTS))
    positions = [
        Position(
            row.key,
            rows.uuid_text(row.id),
            call.attempt_id,
            call.span.span_id if call.span else None,
            found.rewards.get(row.key),
            caller_of(row, found.texts),
            row.prompt_tokens,
            row.output_tokens,
        )
        for call in found.calls
        for row in call.generations
    ]
    named = [call.attempt_id or None for call in found.calls] + [span.attempt_id or None for _, span in found.given]
    return Outline(positions, {each: found.final_reward(each) for each in dict.fromkeys(named)})


def latest_unassigned(connection: Connection, limit: int) -> list[int]:
    """Return the keys of the last calls without a rollout, the latest first."""
    query = select(_GENERATIONS.key).where(_GENERATIONS.rollout_key.is_(None))
    in_order = query.order_by(_GENERATIONS.finished_at.desc(), _GENERATIONS.key.desc())
    return [*connection.execute(in_order.limit(limit)).scalars()]


def read(connection: Connection, keys: Sequence[int]) -> Iterator[CallText]:
    """Yield the generations with these keys, in this order; those that are gone are left out."""
    # Some at once share the blocks of their prompts; all at once may not fit into memory.
    for start in range(0, len(keys), CALLS_AT_ONCE):
        yield from _read(connection, keys[start : start + CALLS_AT_ONCE])


def _read(connection: Connection, keys: Sequence[int]) -> Iterator[CallText]:
    found = {row.key: row for row in connection.execute(_CALL.where(_GENERATIONS.key.in_(keys)))}
    choices: defaultdict[int, list[Any]] = defaultdict(list)
    for choice in connection.execute(_ANSWER.where(_CHOICES.generation_key.in_(keys))):
        choices[choice.generation_key].append(choice)
    named = [name for name in _CALL.selected_columns.keys() if name.endswith("_key")]  # noqa: SIM118 -- no mapping
    known = texts.texts_of(
        connection,
        {getattr(row, name) for row in found.values() for name in named}
        | {each.finish_reason_key for some in choices.values() for each in some},
    )
    in_order = [found[key] for key in keys if key in found]
    for row, prompt in zip(in_order, prompts.texts_of(connection, in_order), strict=True):
        yield CallText(
            key=row.key,
            id=rows.uuid_text(row.id),
            attempt_id=known[row.attempt_key],
            endpoint=known[row.endpoint_key],
            model=known[row.model_key],
            status=STATUSES[row.status],
            started_at=row.started_at,
            finished_at=row.finished_at,
            caller=caller_of(row, known),
            prompt_tokens=row.prompt_tokens,
            prompt=prompt,
            answers=[
                AnswerText(
                    each.index,
                    rows.text_of(each.text),
                    (each.bytes or 0) // BYTES_OF_AN_ID,
                    known[each.finish_reason_key],
                    [version for version, _, _ in rows.versions_of(each.weight_versions) or ()],
                )
                for each in choices[row.key]
            ],
        )
