"""The calls of a rollout: the generations of each, and the spans that name its answer, in order.

The caller owns the transaction. `triplets.of_rollout` has the rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Column, Connection, bindparam, case, or_, select

from agentlightning.errors import RolloutTooLarge
from agentlightning.store import tables, texts
from agentlightning.store.database import in_parts, run

__all__ = [
    "Call",
    "Texts",
    "attempts_match",
    "call_keys",
    "check_size",
    "end_of",
    "group_calls",
    "in_order",
    "keys_with_answers",
    "read_generations",
    "spans_of",
]

Texts = Mapping[int | None, str | None]

MOST_CALLS, MOST_IDS = 100_000, 1 << 27
"""The most of a rollout in memory at once: some 3 kB a call, and at most 17 bytes an id, if each call becomes a row."""

_SPANS, _GENERATIONS = tables.spans.c, tables.generations.c

# Made once: SQLAlchemy takes longer to build a statement than SQLite takes to execute it.
_SPANS_OF_ROLLOUT = (
    select(
        *(_SPANS.key, tables.ATTEMPT_OF_SPAN, _SPANS.sequence_id, _SPANS.is_numbered, _SPANS.span_id),
        *(_SPANS.start_time, _SPANS.end_time, _SPANS.response_id, _SPANS.reward),
        # The body of a call's span may hold thousands of ids, so only the bodies of rewards are read.
        case((_SPANS.reward.is_not(None), _SPANS.body)).label("body"),
    )
    .where(_SPANS.rollout_id == bindparam("rollout"))
    .where(or_(_SPANS.response_id.is_not(None), _SPANS.reward.is_not(None)))
)
_SPANS_OF_ATTEMPT = _SPANS_OF_ROLLOUT.where(_SPANS.attempt_id == bindparam("attempt"))


@dataclass(slots=True)
class Call:
    """The generations of one HTTP call, in the order in which they finished, and the spans that name its answer.

    A call without generations is missing: a span names its answer, but it was lost, or has not arrived yet, or another
    server answered it.
    """

    generations: list[Any]
    spans: list[Any]
    attempt_id: str | None

    @property
    def span(self) -> Any:
        """The first of its spans, which gives its position."""
        return self.spans[0] if self.spans else None

    @property
    def response_id(self) -> Any:
        return (self.generations or self.spans)[-1].response_id

    @property
    def finished_at(self) -> float:
        """Nanoseconds since the epoch; for a missing call by the clock of the agent that made its span."""
        if self.generations:
            return self.generations[-1].finished_at
        ended = end_of(self.span)
        return float("inf") if ended is None else ended * 1e9


def spans_of(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[Any]:
    """List the spans of a rollout that name an answer or give a reward, in the order in which they ended."""
    wanted = {"rollout": rollout_id, "attempt": attempt_id}
    # Spans have these ids unencoded, so no span has an id that a database cannot store.
    if any(
        text is not None and ("\0" in text or text.encode(errors="replace").decode() != text)
        for text in wanted.values()
    ):
        return []
    return _in_time(connection.execute(_SPANS_OF_ROLLOUT if attempt_id is None else _SPANS_OF_ATTEMPT, wanted).all())


def _in_time(spans: Iterable[Any]) -> list[Any]:
    """Sort spans by when they ended.

    Spans that their sender numbered are in the order of their numbers. Each other span comes after the last of these
    that ended before it, by the clock of the agent's host, and the others are in the order of that clock. Spans without
    a time, or with the same time, are in the order of arrival.
    """
    numbered: list[Any] = []
    timed: list[Any] = []
    others: list[Any] = []
    for span in spans:
        (numbered if span.is_numbered else others if end_of(span) is None else timed).append(span)
    numbered.sort(key=lambda span: (span.sequence_id, end_of(span) or 0.0, span.key))
    timed.sort(key=lambda span: (end_of(span), span.sequence_id, span.key))
    others.sort(key=lambda span: (span.sequence_id, span.key))
    found = _merged(numbered, _earliest(end_of(span) for span in numbered), timed, end_of)
    return _merged(found, _earliest(span.sequence_id for span in found), others, lambda span: span.sequence_id)


def end_of(span: Any) -> float | None:
    """Return when a span ended, in seconds since the epoch by the clock of its sender's host."""
    return span.start_time if span.end_time is None else span.end_time


def _earliest(moments: Iterable[float | None]) -> list[float]:
    """Return, for each position, the earliest time from there on: with several clocks, times may go backwards."""
    known = [float("inf") if each is None else each for each in moments]
    return list(accumulate(reversed(known), min))[::-1]


def _merged(
    chain: Sequence[Any], moments: Sequence[float], others: Iterable[Any], moment: Callable[[Any], Any]
) -> list[Any]:
    """Insert each of the others behind the last element of a chain whose time is not later than its own.

    Args:
        moments: times of the chain, ascending.
        others: sorted by their times.
        moment: returns the time of one of the others.
    """
    behind: defaultdict[int, list[Any]] = defaultdict(list)
    for each in others:
        behind[bisect_right(moments, moment(each))].append(each)
    found = [*behind[0]]
    for position, each in enumerate(chain, 1):
        found += (each, *behind[position])
    return found


def call_keys(
    connection: Connection, rollout_id: str, attempt_id: str | None, spans: Iterable[Any]
) -> tuple[set[int], set[str]]:
    """Return the keys of the generations of a rollout's calls, and the answers of its spans that calls share."""
    answers = keys_with_answers(connection, {span.response_id for span in spans if span.response_id is not None})
    keys = {*_keys_under(connection, rollout_id, attempt_id)}
    shared = {answer for answer, calls in answers.items() if len(calls) > 1}
    return keys.union(*(calls[0] for answer, calls in answers.items() if answer not in shared)), shared


def _keys_under(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[int]:
    """Return the keys of the generations recorded under these ids."""
    query = select(_GENERATIONS.key)
    for column, text in ((_GENERATIONS.rollout_key, rollout_id), (_GENERATIONS.attempt_key, attempt_id)):
        if text is not None:
            # -1 is the key of no row: the text is unknown.
            query = query.where(column == (texts.key_of(connection, text) or -1))
    return connection.execute(query).scalars().all()


def keys_with_answers(connection: Connection, response_ids: Iterable[str]) -> dict[str, list[list[int]]]:
    """Map each known answer to its calls, each a list of the keys of its generations, in the order of their end."""
    query = select(_GENERATIONS.response_id, _GENERATIONS.key, _GENERATIONS.call_id)
    found: defaultdict[str, defaultdict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for some in in_parts(sorted(response_ids)):
        of_some = query.where(_GENERATIONS.response_id.in_(some))
        for row in connection.execute(of_some.order_by(_GENERATIONS.finished_at, _GENERATIONS.key)):
            found[row.response_id][_call_of(row)].append(row.key)
    return {answer: [*calls.values()] for answer, calls in found.items()}


def _call_of(row: Any) -> Any:
    """Return what identifies a generation's call; a generation without a `call_id` is a call of its own."""
    return row.key if row.call_id is None else row.call_id


def check_size(connection: Connection, rollout_id: str, keys: Collection[int]) -> None:
    """Check that a rollout's calls can be in memory at once, with their ids.

    Args:
        keys: those of its generations.

    Raises:
        RolloutTooLarge: they are too many, or their prompts too long.
    """
    ids = 0
    if len(keys) <= MOST_CALLS:
        for some in in_parts([*keys]):
            which = f"key IN ({', '.join('?' * len(some))})"
            query = f"SELECT coalesce(sum(prompt_tokens), 0) FROM generations WHERE {which}"
            ids += int(run(connection, query, some).scalar_one())
    if len(keys) > MOST_CALLS or ids > MOST_IDS:
        of_ids = f", whose prompts have {ids:,} ids" if ids else ""
        raise RolloutTooLarge(
            f"the rollout {rollout_id[:100]!r} has {len(keys):,} calls{of_ids}, more than are read at once "
            f"({MOST_CALLS:,} calls, {MOST_IDS:,} ids)",
            "read its generations, which come in pages, and give each task a rollout of its own",
        )


def read_generations(connection: Connection, keys: Iterable[int], more: Sequence[Column[Any]]) -> list[Any]:
    """Read generations without their texts, in the order in which they finished."""
    query = select(
        _GENERATIONS.key,
        _GENERATIONS.id,
        _GENERATIONS.call_id,
        _GENERATIONS.response_id,
        _GENERATIONS.model_key,
        _GENERATIONS.attempt_key,
        _GENERATIONS.sender_key,
        _GENERATIONS.started_at,
        _GENERATIONS.finished_at,
        _GENERATIONS.status,
        *more,
    )
    found = [
        row for some in in_parts(sorted(keys)) for row in connection.execute(query.where(_GENERATIONS.key.in_(some)))
    ]
    return sorted(found, key=lambda row: (row.finished_at, row.key))


def group_calls(generations: Iterable[Any], spans: Iterable[Any], shared: Collection[str], known: Texts) -> list[Call]:
    """Group generations into calls with their spans, and add the missing calls."""
    groups: defaultdict[Any, list[Any]] = defaultdict(list)
    for row in generations:
        groups[row.response_id, _call_of(row)].append(row)
    calls = [Call(group, [], known[group[-1].attempt_key]) for group in groups.values()]
    with_answer: defaultdict[str | None, list[Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.finished_at):
        with_answer[call.response_id].append(call)
    named: defaultdict[str, list[Any]] = defaultdict(list)
    for span in spans:
        if span.response_id is not None:
            named[span.response_id].append(span)
    for answer, naming in named.items():
        found = with_answer[answer]
        of_each = [[span] for span in naming] if answer in shared else [naming]
        if len(found) == len(of_each) and (answer not in shared or all(map(attempts_match, found, naming))):
            for call, its_spans in zip(found, of_each, strict=True):
                call.spans, call.attempt_id = its_spans, its_spans[0].attempt_id or call.attempt_id
        elif len(found) <= len(naming):
            calls += [Call([], [span], span.attempt_id) for span in naming]
    return calls


def attempts_match(call: Call, span: Any) -> bool:
    """Tell whether a call and a span may belong to the same attempt; a missing attempt id matches any."""
    return not call.attempt_id or not span.attempt_id or call.attempt_id == span.attempt_id


def in_order(calls: Iterable[Call], spans: Iterable[Any]) -> list[Call]:
    spanned: list[Call] = []
    others: list[Call] = []
    positions = {id(span): position for position, span in enumerate(spans)}
    for call in calls:
        (others if call.span is None else spanned).append(call)
    spanned.sort(key=lambda call: positions[id(call.span)])
    moments = _earliest(call.finished_at if call.generations else None for call in spanned)
    # A missing call only has a time by an agent's clock, so it is kept between its neighbours and moves neither.
    for position, call in enumerate(spanned):
        if not call.generations:
            moments[position] = min(moments[position], max(call.finished_at, moments[position - 1] if position else 0))
    others.sort(key=lambda call: call.finished_at)
    return _merged(spanned, moments, others, lambda call: call.finished_at)
