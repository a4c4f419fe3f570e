"""All rollouts at a glance: those of the queue, and those that are known from their calls alone.

Everything here works inside a transaction of somebody else's.
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

__all__ = ["COLUMNS", "RECORDED", "Asked", "Column", "Found", "Overview", "of_all"]

Column = Literal["rollout", "status", "calls", "prompt_tokens", "output_tokens", "reward", "started", "duration"]
COLUMNS: tuple[Column, ...] = get_args(Column)

RECORDED = "recorded"
"""The status of a rollout that the queue does not have."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which rollouts, and in which order.

    Attributes:
        search: what is in their id or their input; lower and upper case of A to Z are the same. Empty: whatever is.
        status: of the queue's, or `RECORDED`; None: any.
        sort_by: nulls come last.
        limit, offset: how many, after how many others.
        now: seconds since the epoch, until when what has not ended has lasted.
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
    """One rollout.

    Attributes:
        status: the queue's, or `RECORDED`.
        calls: how many generations of it there are; `finished` of them had an answer that was whole.
        reward: the last that it was given; None where there is none.
        started, duration: seconds since the epoch, and seconds; where it has not ended, until now.
        ended: whether it has.
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


class Found(NamedTuple):
    """Those on one page.

    Attributes:
        total: how many there are on all pages; none where the page is behind the last.
        nobodys: how many calls name no rollout.
    """

    rollouts: list[Overview]
    total: int
    nobodys: int


def of_all(connection: Connection, asked: Asked) -> Found:
    """Those on the page that is asked for."""
    counted = select(func.count()).select_from(generations).where(generations.c.rollout_key.is_(None))
    nobodys = connection.execute(counted).scalar_one()
    # Where every call names a rollout, no span has to.
    each = _all(asked, by_spans=nobodys > 0).subquery()
    duration = func.coalesce(each.c.end_time, asked.now) - each.c.start_time
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
    order = orders[asked.sort_by]
    query = (
        select(each, duration.label("duration"), rewards.c.reward, func.count().over().label("total"))
        .select_from(each.outerjoin(rewards, rewards.c.rollout_id == each.c.rollout_id))
        # The id, lest a page has again what was on the one before.
        .order_by((order.desc() if asked.descending else order.asc()).nulls_last(), each.c.rollout_id)
        .limit(asked.limit)
        .offset(asked.offset)
    )
    found = connection.execute(query).all()
    return Found([_overview(row) for row in found], found[0].total if found else 0, nobodys)


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
        # Of several clocks, one may say that it ended before it began.
        duration=max(row.duration, 0.0),
        ended=row.end_time is not None,
    )


def _all(asked: Asked, by_spans: bool) -> Select[Any]:
    """A row for each rollout that is asked for."""
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
    if asked.search:
        # As it is written in JSON.
        written = json.dumps(asked.search, ensure_ascii=False)[1:-1]
        is_in_input = rollouts.c.input.icontains(written, autoescape=True)
        of_queue = of_queue.where(or_(rollouts.c.rollout_id.icontains(asked.search, autoescape=True), is_in_input))
        recorded = recorded.where(calls.c.rollout_id.icontains(asked.search, autoescape=True))
    both = union_all(of_queue, recorded).subquery()
    found = select(both)
    return found if asked.status is None else found.where(both.c.status == asked.status)


_SUMS = ("calls", "finished", "prompt_tokens", "output_tokens")


def _calls(by_spans: bool) -> Any:
    """Of each rollout that has calls: how many, and how many ids. Those that name it come from an index alone."""
    named = generations.c.rollout_key.is_not(None)
    by_key = select(generations.c.rollout_key, *_sums(generations.c)).where(named)
    counted = by_key.group_by(generations.c.rollout_key).subquery()
    columns = [column for column in counted.c if column.name != "rollout_key"]
    joined = counted.join(texts, texts.c.key == counted.c.rollout_key)
    found = select(texts.c.text.label("rollout_id"), *columns).select_from(joined)
    if by_spans:
        # Those that name none, and whose answer one of its spans names.
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
    # Both halves of `_all` read it: it is put together once.
    return found.cte("calls")


_COUNTED = ("key", "status", "prompt_tokens", "output_tokens", "finished_at")


def _sums(of_each: Any) -> list[ColumnElement[Any]]:
    is_finished = case((of_each.status == STATUSES.index("finished"), 1), else_=0)
    # A sum is no integer to PostgreSQL.
    return [
        func.count().label("calls"),
        cast(func.sum(is_finished), BigInteger).label("finished"),
        cast(func.sum(of_each.prompt_tokens), BigInteger).label("prompt_tokens"),
        cast(func.sum(of_each.output_tokens), BigInteger).label("output_tokens"),
        (cast(func.min(of_each.finished_at), Double) / 1e9).label("started"),
        (cast(func.max(of_each.finished_at), Double) / 1e9).label("ended"),
    ]


def _rewards() -> Any:
    """The last reward of each rollout that has one. From an index alone."""
    has_one = and_(spans.c.reward.is_not(None), spans.c.rollout_id.is_not(None))
    last = (
        select(spans.c.rollout_id, func.max(spans.c.sequence_id).label("sequence_id"))
        .where(has_one)
        .group_by(spans.c.rollout_id)
        .subquery()
    )
    is_last = and_(spans.c.rollout_id == last.c.rollout_id, spans.c.sequence_id == last.c.sequence_id)
    # Whoever sends spans numbers them, and may have given two of them the same.
    return (
        select(spans.c.rollout_id, func.max(spans.c.reward).label("reward"))
        .select_from(spans.join(last, is_last))
        .where(has_one)
        .group_by(spans.c.rollout_id)
        .subquery()
    )
