"""Spans: kept as they came, found by rollout or by trace.

Everything here works inside a transaction of somebody else's, and nothing looks into the body of a span, which may have
thousands of token ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, case, select, update

from agentlightning.store import texts
from agentlightning.store.database import in_parts, insert_if_new, insert_rows
from agentlightning.store.rows import storable
from agentlightning.store.tables import span_sequences, spans

__all__ = ["NewSpan", "add", "next_sequence_ids", "place_again"]

# Made once: SQLAlchemy takes longer to put a statement together than SQLite takes to execute it.
_OF_ROLLOUT = span_sequences.c.rollout_id == bindparam("rollout")
_LAST = select(span_sequences.c.last).where(_OF_ROLLOUT)
_MORE = update(span_sequences).where(_OF_ROLLOUT).values(last=span_sequences.c.last + bindparam("more"))
_HIGHER = case((span_sequences.c.last < bindparam("least"), bindparam("least")), else_=span_sequences.c.last)
_AT_LEAST = update(span_sequences).where(_OF_ROLLOUT).values(last=_HIGHER)


@dataclass(slots=True)
class NewSpan:
    """A span that is to be kept.

    Attributes:
        rollout_id: None, as `attempt_id`, for one that came without.
        sequence_id: its place in the rollout, if its sender gave one; None for the next.
        start_time: seconds since the epoch, as `end_time`.
        response_id: the answer of a model that it is about; `attributes.response_id` finds it, and `reward` finds that.
        body: a JSON object of all but `rollout_id`, `attempt_id`, `sequence_id` and what is in `common`.
        common: a JSON object of what it has in common with many others, which is kept once: `resource` and `scope`.
    """

    rollout_id: str | None
    attempt_id: str | None
    sequence_id: int | None
    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_time: float | None
    end_time: float | None
    response_id: str | None
    reward: float | None
    body: bytes
    common: bytes | None = None


def add(connection: Connection, new: Sequence[NewSpan]) -> int:
    """Keep spans; returns how many are new. One whose span_id its attempt, or its trace, has is left as it is.

    Each that has no `sequence_id` gets it: what is done again in another transaction begins with spans that have none.
    """
    wanted = Counter(each.rollout_id for each in new if each.rollout_id is not None and each.sequence_id is None)
    # In one order: each locks the row of its rollout, and of two that have the same each would wait for the other.
    given = {
        rollout_id: iter(next_sequence_ids(connection, rollout_id, wanted[rollout_id])) for rollout_id in sorted(wanted)
    }
    keys = texts.keys_of(connection, {_text(each.common) for each in new})
    are_numbered = [each.rollout_id is not None and each.sequence_id is not None for each in new]
    highest: dict[str, int] = {}
    for each in new:
        if each.rollout_id is None:
            each.sequence_id = 0
        elif each.sequence_id is None:
            each.sequence_id = next(given[each.rollout_id])
        else:
            highest[each.rollout_id] = max(each.sequence_id, highest.get(each.rollout_id, 0))
    for rollout_id, sequence_id in sorted(highest.items()):
        _at_least(connection, rollout_id, sequence_id)
    values = [
        (
            each.rollout_id,
            each.attempt_id,
            each.sequence_id,
            _column(each.trace_id),
            _column(each.span_id),
            None if each.parent_id is None else _column(each.parent_id),
            _column(each.name),
            each.start_time,
            each.end_time,
            is_numbered,
            storable(each.response_id),
            each.reward,
            keys[_text(each.common)],
            each.body,
        )
        for each, is_numbered in zip(new, are_numbered, strict=True)
    ]
    return insert_rows(connection, spans, values, without="key", if_new=True)


def place_again(connection: Connection, new: Sequence[NewSpan]) -> None:
    """Give spans that name a rollout and no attempt the one that they have already, if they were kept before.

    Else what is sent again, after another attempt has begun, would be a span of that, too.
    """
    unplaced = {(each.trace_id, each.span_id): each for each in new if each.rollout_id and not each.attempt_id}
    for some in in_parts(list(unplaced)):
        query = select(spans.c.trace_id, spans.c.span_id, spans.c.rollout_id, spans.c.attempt_id).where(
            spans.c.trace_id.in_({trace_id for trace_id, _ in some}),
            spans.c.span_id.in_([span_id for _, span_id in some]),
        )
        for row in connection.execute(query):
            each = unplaced.get((row.trace_id, row.span_id))
            if each is not None and each.rollout_id == row.rollout_id:
                each.attempt_id = row.attempt_id


def next_sequence_ids(connection: Connection, rollout_id: str, how_many: int = 1) -> range:
    """Numbers for spans of a rollout that no other gets, and that are higher than those of its spans."""
    more = {"rollout": rollout_id, "more": how_many}
    if not connection.execute(_MORE, more).rowcount:
        insert_if_new(connection, span_sequences, rollout_id=rollout_id, last=0)
        connection.execute(_MORE, more)
    last = connection.execute(_LAST, {"rollout": rollout_id}).scalar_one()
    return range(last - how_many + 1, last + 1)


def _at_least(connection: Connection, rollout_id: str, sequence_id: int) -> None:
    least = {"rollout": rollout_id, "least": sequence_id}
    if connection.execute(_AT_LEAST, least).rowcount:
        return
    if not insert_if_new(connection, span_sequences, rollout_id=rollout_id, last=sequence_id):
        connection.execute(_AT_LEAST, least)


def _text(common: bytes | None) -> str | None:
    return None if common is None else common.decode()


def _column(text: str) -> str:
    # The body has it as it came; in a column it is for finding, and not every database has a NUL in a text.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
