"""The overview: what all rollouts did in each part of a time, at each step or with each version of the weights.

It is read from the sums of their summaries (`store.summaries`), which have to be refreshed before; a few hours are
added up here, in smaller parts. The caller owns the transaction.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal, NamedTuple

from sqlalchemy import Connection, func, select

from agentlightning.rollout_records import FINISHED, ROLLOUT_STATUSES
from agentlightning.store import tables
from agentlightning.store.database import run
from agentlightning.store.rows import storable, text_of
from agentlightning.store.summaries import RECORDED, Portion, Summary, portions, slot

__all__ = ["Axis", "Bin", "Measure", "Overview", "activity", "by_axis", "by_name", "of_time", "under_way"]

Axis = Literal["version", "step"]
HOUR, DAY = 3600, 86_400
FINE_HOURS = 3
"""Hours that are added up from their rollouts, in parts of minutes; of a longer time, the sums of hours are read."""
MOST_BINS = 48
WIDTHS = (60, 120, 300, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY)
NANOSECONDS = 10**9
ENDED = (*FINISHED, RECORDED)

_OF, _SUMS = tables.summaries.c, tables.tallies.c
_LOSSES = "SELECT last_at, count FROM losses WHERE last_at >= ? AND last_at < ?"
_DIGITS = re.compile(r"(\d+)")


@dataclass(slots=True)
class Measure:
    """The values of one measure: how many, their sum, and how many are about as large as each value."""

    count: int = 0
    amount: float = 0.0
    values: Counter[float] = field(default_factory=Counter)

    def add(self, portion: Portion) -> None:
        self.count += portion.count
        self.amount += portion.amount
        self.values[portion.value] += portion.count

    @property
    def mean(self) -> float | None:
        return self.amount / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Return the value that this share of them reaches at most, to two digits."""
        rest = share * self.count
        for value in sorted(self.values):
            rest -= self.values[value]
            if rest <= 0 and self.count:
                return value
        return None


@dataclass(slots=True, eq=False)
class Bin:
    """Counts of rollouts in a part of a time, at a step, or with a version of the weights.

    Attributes:
        name: of the step or version; empty for a part of a time.
        start, end: of the part, in seconds since the epoch; 0 for a step or version.
        lost: calls that senders report as lost.
    """

    name: str
    start: float = 0.0
    end: float = 0.0
    lost: int = 0
    measures: defaultdict[str, Measure] = field(default_factory=lambda: defaultdict(Measure))

    @property
    def rollouts(self) -> int:
        return sum(self.measures[each].count for each in (*ROLLOUT_STATUSES, RECORDED) if each in self.measures)

    @property
    def ended(self) -> int:
        return sum(self.measures[each].count for each in ENDED if each in self.measures)

    @property
    def success(self) -> float | None:
        """The share of rollouts that succeeded, of those that did or failed."""
        succeeded, failed = (self.measures[each].count for each in ("succeeded", "failed"))
        return succeeded / (succeeded + failed) if succeeded + failed else None

    def add(self, portion: Portion) -> None:
        self.measures[portion.measure].add(portion)


class Overview(NamedTuple):
    """Bins in their order, and all of them together; `left_out` steps or versions before these are not among them."""

    bins: list[Bin]
    whole: Bin
    left_out: int = 0


class _Found(NamedTuple):
    """A portion, and where it belongs."""

    slot: str
    name: str
    portion: Portion


def activity(connection: Connection) -> tuple[float, float] | None:
    """Return when the first and the last rollout were active; None without rollouts."""
    first = connection.execute(select(func.min(_OF.active))).scalar()
    return None if first is None else (first, connection.execute(select(func.max(_OF.active))).scalar_one())


def under_way(connection: Connection) -> dict[str, int]:
    """Count the rollouts that have not ended, by status."""
    status, wanted = tables.rollouts.c.status, [each for each in ROLLOUT_STATUSES if each not in FINISHED]
    query = select(status, func.count()).where(status.in_(wanted)).group_by(status)
    return dict.fromkeys(wanted, 0) | {row[0]: row[1] for row in connection.execute(query)}


def of_time(
    connection: Connection, since: float, until: float, dimension: str = "", name: str | None = None
) -> Overview:
    """Read what happened from one moment to another, in equal parts.

    Args:
        dimension: one of `summaries.DIMENSIONS`; empty for all rollouts.
        name: in this dimension; None for all that have one.
    """
    width = _width(since, until)
    bins = _parts(since, until, width)
    by_slot = {slot(each.start, width): each for each in bins}
    for each in _of_time(connection, bins, width, dimension, name):
        if (of_slot := by_slot.get(each.slot)) is not None:
            of_slot.add(each.portion)
    if not dimension:
        moments = [int(each * NANOSECONDS) for each in (bins[0].start, bins[-1].end)]
        for last_at, count in map(tuple, run(connection, _LOSSES, moments)):
            bins[int((last_at / NANOSECONDS - bins[0].start) // width)].lost += count
    return Overview(bins, _whole(bins))


def by_axis(connection: Connection, axis: Axis, dimension: str = "", name: str | None = None) -> Overview:
    """Read what happened at the last steps, or with the last versions of the weights."""
    found: dict[str, Bin] = {}
    for each in _sums(connection, axis, dimension, name):
        found.setdefault(each.slot, Bin(text_of(each.slot))).add(each.portion)
    in_order = sorted(found.values(), key=lambda each: _natural(each.name))
    bins = in_order[-MOST_BINS:]
    return Overview(bins, _whole(bins), len(in_order) - len(bins))


def by_name(
    connection: Connection, dimension: str, overview: Overview, axis: Axis | None = None
) -> dict[str, Overview]:
    """Divide an overview by the names of a dimension, those with the most rollouts first."""
    bins: dict[str, list[Bin]] = {}
    places = {}
    if axis is None:
        since, until = overview.bins[0].start, overview.bins[-1].end
        width = _width(since, until)
        found = _of_time(connection, overview.bins, width, dimension, None)
        places = {slot(each.start, width): place for place, each in enumerate(overview.bins)}
    else:
        found = _sums(connection, axis, dimension, None)
        places = {storable(each.name): place for place, each in enumerate(overview.bins)}
    for each in found:
        place = places.get(each.slot)
        if place is not None:
            of_name = bins.get(each.name)
            if of_name is None:
                of_name = bins[each.name] = [Bin(one.name, one.start, one.end) for one in overview.bins]
            of_name[place].add(each.portion)
    divided = {text_of(name): Overview(of_name, _whole(of_name)) for name, of_name in bins.items()}
    return dict(sorted(divided.items(), key=lambda each: (-each[1].whole.rollouts, each[0])))


def _width(since: float, until: float) -> int:
    """Return the seconds of a part: the shortest round time of which there are not too many."""
    span = max(until - since, 60.0)
    allowed = [each for each in WIDTHS if each >= HOUR or span <= FINE_HOURS * HOUR]
    return next(
        (each for each in allowed if span / each <= MOST_BINS), -(-int(span / MOST_BINS) // (24 * HOUR)) * 24 * HOUR
    )


def _parts(since: float, until: float, width: int) -> list[Bin]:
    first, last = int(since // width), int(max(until, since) // width)
    return [Bin("", each * width, (each + 1) * width) for each in range(first, last + 1)]


def _of_time(
    connection: Connection, bins: Sequence[Bin], width: int, dimension: str, name: str | None
) -> Iterator[_Found]:
    if width < HOUR:
        yield from _fine(connection, bins[0].start, bins[-1].end, width, dimension, name)
        return
    for each in _sums(connection, "hour", dimension, name, slot(bins[0].start), slot(bins[-1].end)):
        yield each._replace(slot=slot(_moment(each.slot), width))


def _fine(
    connection: Connection, since: float, until: float, width: int, dimension: str, name: str | None
) -> Iterator[_Found]:
    query = select(tables.summaries).where(_OF.active >= since, _OF.active < until)
    if name is not None:
        query = query.where(_OF[dimension] == storable(name))
    for row in connection.execute(query):
        found = Summary(*row)
        of_name = getattr(found, dimension) if dimension else ""
        if of_name is not None:
            of_slot = slot(found.active, width)
            for portion in portions(found):
                yield _Found(of_slot, of_name, portion)


def _sums(
    connection: Connection,
    axis: str,
    dimension: str,
    name: str | None,
    first: str | None = None,
    end: str | None = None,
) -> Iterator[_Found]:
    columns = "slot, name, measure, value, count, amount"
    where: dict[str, str | None] = {"axis = ?": axis, "dimension = ?": dimension, "slot >= ?": first, "slot < ?": end}
    where["name = ?"] = storable(name)
    given = {each: value for each, value in where.items() if value is not None}
    query = f"SELECT {columns} FROM tallies WHERE {' AND '.join(given)}"
    for of_slot, of_name, *portion in map(tuple, run(connection, query, [*given.values()])):
        yield _Found(of_slot, of_name, Portion(*portion))


def _moment(name: str) -> float:
    return datetime.fromisoformat(name).replace(tzinfo=timezone.utc).timestamp()


def _whole(bins: Iterable[Bin]) -> Bin:
    whole = Bin("")
    for each in bins:
        whole.lost += each.lost
        for measure, of_measure in each.measures.items():
            known = whole.measures[measure]
            known.count += of_measure.count
            known.amount += of_measure.amount
            known.values.update(of_measure.values)
    return whole


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort `step-9` before `step-10`."""
    return [(1, int(part), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in _DIGITS.split(name)]
