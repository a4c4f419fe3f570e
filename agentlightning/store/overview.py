"""The table of all rollouts: those of the queue, and those that are known from their calls alone.

The caller owns the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Double,
    Select,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)

from agentlightning.generation import STATUSES
from agentlightning.store.absence import UNDER_WAY
from agentlightning.store.rows import text_of
from agentlightning.store.tables import attempts, drifts, generations, rollouts, spans, texts
from agentlightning.store.texts import known_keys

__all__ = ["COLUMNS", "RECORDED", "Column", "Overview", "OverviewPage", "OverviewQuery", "call_times", "page"]

Column = Literal[
    "rollout", "status", "calls", "prompt_tokens", "output_tokens", "breaks", "reward", "queued", "started", "duration"
]
COLUMNS: tuple[Column, ...] = get_args(Column)

RECORDED = "recorded"
"""Status of a rollout that was never in the queue."""


@dataclass(frozen=True, slots=True)
class OverviewQuery:
    """Filter, order and page of the table.

    Attributes:
        search: text in the id or the input, ignoring the case of A to Z; empty for all rollouts.
        status: a status of the queue, or `RECORDED`; None for any.
        broken: only rollouts with breaks that nobody meant.
        sort_by: a column; nulls come last. A rollout that was never queued is sorted by its first call in `queued`.
        limit, offset: size of the page, and rollouts to skip.
        now: seconds since the epoch; the duration of a rollout that has not ended is measured up to here.
    """

    search: str = ""
    status: str | None = None
    broken: bool = False
    sort_by: Column = "queued"
    descending: bool = True
    limit: int = 100
    offset: int = 0
    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Overview:
    """A row of the table: one rollout.

    Attributes:
        status: its status in the queue, or `RECORDED`.
        calls: number of its generations, of which `finished` have a complete answer.
        breaks: how often its prompts broke and nobody meant it; None where they were not compared yet.
        reward: its last reward; None where it has none.
        queued: seconds since the epoch; None if it was never in the queue.
        started: when its first attempt started, or its first call if it was never queued; None if none has.
        attempt_started: when its latest attempt started; None if none is under way.
        duration: seconds from `started` until it ended, or until now; None if it has not started.
        ended: whether it has ended.
    """

    rollout_id: str
    status: str
    attempts: int
    calls: int
    finished: int
    prompt_tokens: int
    output_tokens: int
    breaks: int | None
    reward: float | None
    queued: float | None
    started: float | None
    attempt_started: float | None
    duration: float | None
    ended: bool


class OverviewPage(NamedTuple):
    """A page of the table.

    Attributes:
        total: number of rollouts on all pages; 0 where the page is past the last one.
        unassigned_calls: number of calls that name no rollout.
    """

    rollouts: list[Overview]
    total: int
    unassigned_calls: int


def page(connection: Connection, wanted: OverviewQuery) -> OverviewPage:
    """Read a page of the table."""
    counted = select(func.count()).select_from(generations).where(generations.c.rollout_key.is_(None))
    unassigned_calls = connection.execute(counted).scalar_one()
    # If every call names a rollout, spans need not be searched.
    each = _all(wanted, by_spans=unassigned_calls > 0).subquery()
    duration = func.coalesce(each.c.end_time, wanted.now) - each.c.started
    rewards = _rewards()
    orders: Mapping[Column, ColumnElement[Any]] = {
        "rollout": each.c.rollout_id,
        "status": each.c.status,
        "calls": each.c.calls,
        "prompt_tokens": each.c.prompt_tokens,
        "output_tokens": each.c.output_tokens,
        "breaks": drifts.c.breaks,
        "reward": rewards.c.reward,
        "queued": func.coalesce(each.c.queued, each.c.started),
        "started": each.c.started,
        "duration": duration,
    }
    order = orders[wanted.sort_by]
    query = (
        select(each, duration.label("duration"), rewards.c.reward, drifts.c.breaks, func.count().over().label("total"))
        .select_from(
            each.outerjoin(rewards, rewards.c.rollout_id == each.c.rollout_id).outerjoin(
                drifts, drifts.c.rollout_id == each.c.rollout_id
            )
        )
        .where(*([drifts.c.breaks > 0] if wanted.broken else []))
        # The id makes the order total, so that no rollout is on two pages.
        .order_by((order.desc() if wanted.descending else order.asc()).nulls_last(), each.c.rollout_id)
        .limit(wanted.limit)
        .offset(wanted.offset)
    )
    found = connection.execute(query).all()
    # For the rows of this page alone: the index that sorts the table has only the ends of calls.
    times = call_times(connection, [text_of(row.rollout_id) for row in found if row.status == RECORDED])
    under_way = _attempt_starts(connection, [row.rollout_id for row in found if row.status in UNDER_WAY])
    rows = [_overview(row, times.get(text_of(row.rollout_id)), under_way.get(row.rollout_id)) for row in found]
    return OverviewPage(rows, found[0].total if found else 0, unassigned_calls)


def _overview(row: Any, times: tuple[float, float] | None, attempt_started: float | None) -> Overview:
    started, duration = row.started, row.duration
    if times is not None:
        started, duration = times[0], times[1] - times[0]
    return Overview(
        rollout_id=text_of(row.rollout_id),
        status=row.status,
        attempts=row.attempts,
        calls=row.calls,
        finished=row.finished,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        breaks=row.breaks,
        reward=row.reward,
        queued=row.queued,
        started=started,
        attempt_started=attempt_started,
        # Start and end may come from different clocks, so the difference may be negative.
        duration=None if duration is None else max(duration, 0.0),
        ended=row.end_time is not None,
    )


def _attempt_starts(connection: Connection, rollout_ids: Sequence[str]) -> dict[str, float]:
    """Map rollouts to the start of their latest attempt, in seconds since the epoch."""
    is_latest = and_(attempts.c.rollout_key == rollouts.c.key, attempts.c.sequence_id == rollouts.c.attempts)
    query = select(rollouts.c.rollout_id, attempts.c.start_time).select_from(rollouts.join(attempts, is_latest))
    found = connection.execute(query.where(rollouts.c.rollout_id.in_(rollout_ids)))
    return {row.rollout_id: row.start_time for row in found}


def call_times(connection: Connection, rollout_ids: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Map rollouts to the start of their first call and the end of their last one, in seconds since the epoch.

    Only calls that name their rollout count; a rollout without such calls is left out.
    """
    keys = known_keys(connection, rollout_ids)
    of_keys = {key: rollout_id for rollout_id, key in keys.items()}
    times = (
        func.min(func.coalesce(generations.c.started_at, generations.c.finished_at)),
        func.max(generations.c.finished_at),
    )
    query = select(generations.c.rollout_key, *times).where(generations.c.rollout_key.in_(of_keys))
    found = connection.execute(query.group_by(generations.c.rollout_key))
    return {of_keys[key]: (started / 1e9, ended / 1e9) for key, started, ended in found}


def _all(wanted: OverviewQuery, by_spans: bool) -> Select[Any]:
    """Select a row for each rollout that matches the filters."""
    calls = _calls(by_spans)
    is_first = and_(attempts.c.rollout_key == rollouts.c.key, attempts.c.sequence_id == 1)
    joined = rollouts.outerjoin(attempts, is_first)
    of_queue = select(
        rollouts.c.rollout_id,
        rollouts.c.status,
        rollouts.c.attempts,
        rollouts.c.start_time.label("queued"),
        attempts.c.start_time.label("started"),
        rollouts.c.end_time,
        *(func.coalesce(calls.c[name], 0).label(name) for name in _SUMS),
    ).select_from(joined.outerjoin(calls, calls.c.rollout_id == rollouts.c.rollout_id))
    recorded = select(
        calls.c.rollout_id,
        literal(RECORDED).label("status"),
        literal(0).label("attempts"),
        cast(null(), Double).label("queued"),
        calls.c.started,
        calls.c.ended.label("end_time"),
        *(calls.c[name] for name in _SUMS),
    ).where(~exists().where(rollouts.c.rollout_id == calls.c.rollout_id))
    if wanted.search:
        # The input is stored as JSON.
        written = json.dumps(wanted.search, ensure_ascii=False)[1:-1]
        is_in_input = rollouts.c.input.icontains(written, autoescape=True)
        of_queue = of_queue.where(or_(rollouts.c.rollout_id.icontains(wanted.search, autoescape=True), is_in_input))
        recorded = recorded.where(calls.c.rollout_id.icontains(wanted.search, autoescape=True))
    both = union_all(of_queue, recorded).subquery()
    found = select(both)
    return found if wanted.status is None else found.where(both.c.status == wanted.status)


_SUMS = ("calls", "finished", "prompt_tokens", "output_tokens")


def _calls(by_spans: bool) -> Any:
    """Select the counts of each rollout that has calls. Calls that name their rollout are read from an index alone."""
    named = generations.c.rollout_key.is_not(None)
    by_key = select(generations.c.rollout_key, *_sums(generations.c)).where(named)
    counted = by_key.group_by(generations.c.rollout_key).subquery()
    columns = [column for column in counted.c if column.name != "rollout_key"]
    joined = counted.join(texts, texts.c.key == counted.c.rollout_key)
    found = select(texts.c.text.label("rollout_id"), *columns).select_from(joined)
    if by_spans:
        # Calls that name no rollout, but whose answer is named by a span of the rollout.
        spanned = (
            select(spans.c.rollout_id, *(generations.c[name] for name in _COUNTED))
            .select_from(spans.join(generations, generations.c.response_id == spans.c.response_id))
            .where(spans.c.response_id.is_not(None), spans.c.rollout_id.is_not(None))
            .where(generations.c.rollout_key.is_(None))
            .distinct()
            .subquery()
        )
        of_spans = select(spanned.c.rollout_id, *_sums(spanned.c)).group_by(spanned.c.rollout_id)
        both = union_all(found, of_spans).subquery()
        sums = [cast(func.sum(both.c[name]), BigInteger).label(name) for name in _SUMS]
        moments = [func.min(both.c.started).label("started"), func.max(both.c.ended).label("ended")]
        found = select(both.c.rollout_id, *sums, *moments).group_by(both.c.rollout_id)
    # A CTE, since both halves of `_all` read it.
    return found.cte("calls")


_COUNTED = ("key", "status", "prompt_tokens", "output_tokens", "finished_at")


def _sums(of_each: Any) -> list[ColumnElement[Any]]:
    is_finished = case((of_each.status == STATUSES.index("finished"), 1), else_=0)
    # In PostgreSQL the sum of integers is a numeric.
    return [
        func.count().label("calls"),
        cast(func.sum(is_finished), BigInteger).label("finished"),
        cast(func.sum(of_each.prompt_tokens), BigInteger).label("prompt_tokens"),
        cast(func.sum(of_each.output_tokens), BigInteger).label("output_tokens"),
        (cast(func.min(of_each.finished_at), Double) / 1e9).label("started"),
        (cast(func.max(of_each.finished_at), Double) / 1e9).label("ended"),
    ]


def _rewards() -> Any:
    """Select the reward of each rollout that has one: the one that was given last, whenever it arrived."""
    given_last = spans.c.end_time.desc().nulls_last(), spans.c.sequence_id.desc(), spans.c.reward.desc()
    rank = func.row_number().over(partition_by=spans.c.rollout_id, order_by=given_last).label("rank")
    has_one = and_(spans.c.reward.is_not(None), spans.c.rollout_id.is_not(None))
    ranked = select(spans.c.rollout_id, spans.c.reward, rank).where(has_one).subquery()
    return select(ranked.c.rollout_id, ranked.c.reward).where(ranked.c.rank == 1).subquery()
