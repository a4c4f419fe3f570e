"""The list of all rollouts: those of the queue, and those that are known from their calls alone.

It is read from their summaries (`store.summaries`), which have to be refreshed before. The caller owns the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from agentlightning.store import tables
from agentlightning.store.rows import storable, text_of
from agentlightning.store.summaries import DIMENSIONS, Summary
from agentlightning.store.tables import generations, rollouts
from agentlightning.store.texts import known_keys

__all__ = [
    "NAMES",
    "RANGES",
    "Column",
    "ListPage",
    "ListQuery",
    "call_times",
    "duration_of",
    "names_of",
    "page",
    "rollout_ids",
    "summaries_of",
]

Column = Literal[
    "task",
    "rollout",
    "reward",
    "status",
    "calls",
    "prompt_tokens",
    "output_tokens",
    "latency",
    "breaks",
    "queued",
    "started",
    "active",
    "duration",
    "worker",
    "model",
    "agent",
    "version",
    "step",
    "tags",
]
RANGES: tuple[Column, ...] = (
    "reward",
    "calls",
    "prompt_tokens",
    "output_tokens",
    "latency",
    "breaks",
    "queued",
    "started",
    "active",
    "duration",
)
"""Columns of numbers and times, which are filtered by a range."""
NAMES: tuple[Column, ...] = ("status", "worker", "model", "agent", "version", "step")
"""Columns of names, which are filtered by one of them."""
MOST_NAMES = 100

Range = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Filter, order and page of the list.

    Attributes:
        search: text in the id or the input, ignoring the case of A to Z; empty for all rollouts.
        ranges: of each column the lowest and highest value, both included; None for no limit.
        names: of each column the name that it has.
        tag: a tag `name=value`, or how it begins; empty for any.
        sort_by: a column; nulls come last. A rollout that was never queued is sorted by its first call in `queued`.
        limit, offset: size of the page, and rollouts to skip.
        now: seconds since the epoch; the duration of a rollout that has not ended is measured up to here.
    """

    search: str = ""
    ranges: Mapping[Column, Range] = field(default_factory=dict)
    names: Mapping[Column, str] = field(default_factory=dict)
    tag: str = ""
    sort_by: Column = "queued"
    descending: bool = True
    limit: int = 100
    offset: int = 0
    now: float = 0.0

    @property
    def is_filtered(self) -> bool:
        return bool(self.search or self.ranges or self.names or self.tag)


class ListPage(NamedTuple):
    """A page of the list.

    Attributes:
        total: number of rollouts on all pages.
        unassigned_calls: number of calls that name no rollout.
    """

    rollouts: list[Summary]
    total: int
    unassigned_calls: int


_OF = tables.summaries.c
_DECODED = ("rollout_id", "worker", "model", "agent", "version", "step", "tags", "task")


def page(connection: Connection, wanted: ListQuery) -> ListPage:
    """Read a page of the list."""
    unassigned = select(func.count()).select_from(generations).where(generations.c.rollout_key.is_(None))
    where = _conditions(wanted)
    total = connection.execute(select(func.count()).select_from(tables.summaries).where(*where)).scalar_one()
    query = select(tables.summaries).where(*where).order_by(*_order(wanted)).limit(wanted.limit).offset(wanted.offset)
    found = [decoded(Summary(*row)) for row in connection.execute(query)]
    return ListPage(found, total, connection.execute(unassigned).scalar_one())


def rollout_ids(connection: Connection, wanted: ListQuery) -> list[str]:
    """Return the ids of all rollouts that match, in order, whatever the page."""
    query = select(_OF.rollout_id).where(*_conditions(wanted)).order_by(*_order(wanted))
    return [text_of(each) for each in connection.execute(query).scalars()]


def summaries_of(connection: Connection, rollout_ids: Sequence[str]) -> list[Summary]:
    """Read the summaries of these rollouts, at most as many as a part of `in_parts`, in this order.

    Those that are gone are left out.
    """
    stored = [storable(each) or "" for each in rollout_ids]
    query = select(tables.summaries).where(_OF.rollout_id.in_(stored))
    found = {row.rollout_id: decoded(Summary(*row)) for row in connection.execute(query)}
    return [found[each] for each in stored if each in found]


def names_of(connection: Connection) -> dict[str, list[str]]:
    """List the names that columns have, to choose from: from the sums, which are far fewer than the rollouts."""
    return {column: [*_names(connection, column)] for column in DIMENSIONS}


def decoded(found: Summary) -> Summary:
    """Return a summary with its texts as they were given."""
    texts = {name: text_of(getattr(found, name)) for name in _DECODED}
    return replace(found, **texts)


def duration_of(found: Summary, now: float) -> float | None:
    """Return the seconds from a rollout's start until it ended, or until now; None if it has not started."""
    if found.started is None:
        return None
    # Start and end may come from different clocks, so the difference may be negative.
    return max((now if found.ended is None else found.ended) - found.started, 0.0)


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


def _names(connection: Connection, dimension: str) -> Iterator[str]:
    of = tables.tallies.c
    query = select(of.name).where(of.axis == "hour", of.dimension == dimension).distinct().order_by(of.name)
    yield from map(text_of, connection.execute(query.limit(MOST_NAMES)).scalars())


def _columns(now: float) -> Mapping[str, ColumnElement[Any]]:
    """Return what columns are filtered and sorted by."""
    return {each.name: _OF[each.name] for each in fields(Summary)} | {
        "rollout": _OF.rollout_id,
        "duration": func.coalesce(_OF.ended, now) - _OF.started,
    }


def _order(wanted: ListQuery) -> list[ColumnElement[Any]]:
    # The id makes the order total, so that no rollout is on two pages.
    if wanted.sort_by == "queued":
        # Never null, so that an index has this order, in which the list is seen at first.
        return [_OF.since.desc() if wanted.descending else _OF.since.asc(), _OF.rollout_id]
    by = _columns(wanted.now)[wanted.sort_by]
    return [(by.desc() if wanted.descending else by.asc()).nulls_last(), _OF.rollout_id.asc()]


def _conditions(wanted: ListQuery) -> list[ColumnElement[bool]]:
    columns = _columns(wanted.now)
    found: list[ColumnElement[bool]] = []
    if wanted.search:
        # The input is stored as JSON.
        written = json.dumps(wanted.search, ensure_ascii=False)[1:-1]
        has_it = select(rollouts.c.rollout_id).where(rollouts.c.input.icontains(written, autoescape=True))
        is_in_id = _OF.rollout_id.icontains(wanted.search, autoescape=True)
        found.append(or_(is_in_id, _OF.rollout_id.in_(has_it)))
    for column, (low, high) in wanted.ranges.items():
        of_column = columns[column]
        limits = ([] if low is None else [of_column >= low]) + ([] if high is None else [of_column <= high])
        found.append(and_(of_column.is_not(None), *limits))
    found += [columns[column] == storable(name) for column, name in wanted.names.items()]
    if wanted.tag:
        found.append(_OF.tags.contains(f"\n{storable(wanted.tag)}", autoescape=True))
    return found
