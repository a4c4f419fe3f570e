"""The table of all rollouts: those of the queue, and those that are known from their calls alone.

The caller owns the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    or_,
    select,
    union_all,
)

from agentlightning.generation import STATUSES
from agentlightning.store.rows import text_of
from agentlightning.store.tables import generations, rollouts, spans, texts

__all__ = ["COLUMNS", "RECORDED", "Column", "Overview", "OverviewPage", "OverviewQuery", "page"]

Column = Literal["rollout", "status", "calls", "prompt_tokens", "output_tokens", "reward", "started", "duration"]
COLUMNS: tuple[Column, ...] = get_args(Column)

RECORDED = "recorded"
"""Status of a rollout that was never in the queue."""


@dataclass(frozen=True, slots=True)
class OverviewQuery:
    """Filter, order and page of the table.

    Attributes:
        search: text in the id or the input, ignoring the case of A to Z; empty for all rollouts.
        status: a status of the queue, or `RECORDED`; None for any.
        sort_by: a column; nulls come last.
        limit, offset: size of the page, and rollouts to skip.
        now: seconds since the epoch; the duration of a rollout that has not ended is measured up to here.
    """

    search: str = ""
    status: str | None = None
    sort_by: Column = "started"
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
        reward: its last reward; None where it has none.
        started: seconds since the epoch.
        duration: seconds until it ended, or until now.
        ended: whether it has ended.
    """

    rollout_id: str
    status: str
    attempts: int
    calls: int
    finished: int
    prompt_tokens: int
    output_tokens: int
    reward: float | None
    started: float
    duration: float
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
    duration = func.coalesce(each.c.end_time, wanted.now) - each.c.start_time
    rewards = _rewards()
    orders: Mapping[Column, ColumnElement[Any]] = {
        "rollout": each.c.rollout_id,
        "status": each.c.status,
        "calls": each.c.calls,
        "prompt_tokens": each.c.prompt_tokens,
        "output_tokens": each.c.output_tokens,
        "reward": rewards.c.reward,
        "started": each.c.start_time,
        "duration": duration,
    }
    order = orders[wanted.sort_by]
    query = (
        select(each, duration.label("duration"), rewards.c.reward, func.count().over().label("total"))
        .select_from(each.outerjoin(rewards, rewards.c.rollout_id == each.c.rollout_id))
        # The id makes the order total, so that no rollout is on two pages.
        .order_by((order.desc() if wanted.descending else order.asc()).nulls_last(), each.c.rollout_id)
        .limit(wanted.limit)
        .offset(wanted.offset)
    )
    found = connection.execute(query).all()
    return OverviewPage([_overview(row) for row in found], found[0].total if found else 0, unassigned_calls)


def _overview(row: Any) -> Overview:
    return Overview(
        rollout_id=text_of(row.rollout_id),
        status=row.status,
        attempts=row.attempts,
        calls=row.calls,
        finished=row.finished,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        reward=row.reward,
        started=row.start_time,
        # Start and end may come from different clocks, so the difference may be negative.
        duration=max(row.duration, 0.0),
        ended=row.end_time is not None,
    )


def _all(wanted: OverviewQuery, by_spans: bool) -> Select[Any]:
    """Select a row for each rollout that matches the filters."""
    calls = _calls(by_spans)
    of_queue = select(
        rollouts.c.rollout_id,
        rollouts.c.status,
        rollouts.c.attempts,
        rollouts.c.start_time,
        rollouts.c.end_time,
        *(func.coalesce(calls.c[name], 0).label(name) for name in _SUMS),
    ).select_from(rollouts.outerjoin(calls, calls.c.rollout_id == rollouts.c.rollout_id))
    recorded = select(
        calls.c.rollout_id,
        literal(RECORDED).label("status"),
        literal(0).label("attempts"),
        calls.c.started.label("start_time"),
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
