"""One rollout over time: its attempts, in each the spans as a tree, and the generations where they belong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, case, func, select

from agentlightning.server.page.conversation import Call
from agentlightning.server.page.tree import DEEPEST, in_tree
from agentlightning.store import attributes, tables

__all__ = ["Bar", "Row", "Timeline", "of_rollout"]

SPANS_SHOWN = 1000
# Bytes: whoever looks on asks every few seconds, and a prompt with its ids may be MiBs. How long one is, a database
# knows without reading it.
LARGEST_READ = 64 << 10
# Of the whole, in percent.
NARROWEST = 0.4
UNDER_WAY = ("preparing", "running")

_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class Bar:
    """What began, and ended.

    Attributes:
        kind: `attempt`, `span` or `generation`.
        state: how it ended, in the store's words; empty where nobody said, or where it is in a body that is too large.
        start, end: seconds since the epoch; None where unknown, or not yet.
        generation_id: of a generation, whose page it leads to.
    """

    kind: str
    depth: int
    label: str
    state: str
    start: float | None
    end: float | None
    generation_id: str | None = None
    reward: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.start is None or self.end is None else max(self.end - self.start, 0.0)


class Row(NamedTuple):
    """A bar, and how far from the left it begins and how wide it is: from 0 to 100 of the whole."""

    bar: Bar
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows from top to bottom, the moments that they lie between, and how many spans were left out of them."""

    rows: Sequence[Row]
    start: float
    end: float
    left_out: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


def of_rollout(connection: Connection, rollout_id: str, rollout: Any | None, calls: Sequence[Call]) -> Timeline:
    """The timeline of a rollout.

    Args:
        rollout: its row in the queue; None where it has none.
        calls: its generations.
    """
    attempts = [] if rollout is None else _attempts(connection, rollout.key)
    spans = _spans(connection, rollout_id)
    bars = list(_bars(attempts, spans[:SPANS_SHOWN], calls))
    moments = [each for bar in bars for each in (bar.start, bar.end) if each is not None]
    start, end = (min(moments), max(moments)) if moments else (0.0, 0.0)
    if any(bar.state in UNDER_WAY for bar in bars):
        end = max(end, time.time())
    return Timeline([_row(bar, start, end) for bar in bars], start, end, max(len(spans) - SPANS_SHOWN, 0))


def _attempts(connection: Connection, rollout_key: int) -> Sequence[Any]:
    table = tables.attempts
    query = select(table).where(table.c.rollout_key == rollout_key).order_by(table.c.sequence_id)
    return connection.execute(query).all()


def _spans(connection: Connection, rollout_id: str) -> Sequence[Any]:
    table = tables.spans
    columns = [column for column in table.c if column is not table.c.body]
    body = case((func.length(table.c.body) <= LARGEST_READ, table.c.body)).label("body")
    query = select(*columns, body).where(table.c.rollout_id == rollout_id).order_by(table.c.sequence_id, table.c.key)
    return connection.execute(query.limit(SPANS_SHOWN + 1)).all()


def _bars(attempts: Sequence[Any], spans: Sequence[Any], calls: Sequence[Call]) -> Iterator[Bar]:
    known = {each.attempt_id: each for each in attempts}
    # Of those that name one that the queue does not have, each has a place of its own, after the others.
    ids = [*known, *(each.attempt_id for each in (*spans, *calls))]
    for attempt_id in dict.fromkeys(ids):
        theirs = [each for each in spans if each.attempt_id == attempt_id]
        calls_of_it = [each for each in calls if each.attempt_id == attempt_id]
        bars = list(_below(theirs, calls_of_it))
        yield _attempt(attempt_id, known.get(attempt_id), bars)
        yield from bars


def _attempt(attempt_id: str | None, found: Any | None, bars: Sequence[Bar]) -> Bar:
    moments = [each for bar in bars for each in (bar.start, bar.end) if each is not None]
    if found is None:
        label = f"Attempt {attempt_id}" if attempt_id else "Calls that name no attempt"
        return Bar("attempt", 0, label, "", min(moments, default=None), max(moments, default=None))
    end = found.end_time
    if end is None and found.status not in UNDER_WAY:
        # Of one that was given up, only when it was heard of last is known.
        end = max(found.last_heartbeat_time or found.start_time, *moments, found.start_time)
    return Bar("attempt", 0, f"Attempt {found.sequence_id}: {attempt_id}", found.status, found.start_time, end)


def _below(spans: Sequence[Any], calls: Sequence[Call]) -> Iterator[Bar]:
    """The spans as a tree, each generation below the span that names it, the others where they began."""
    found = sorted([*spans, *calls], key=_began)
    for depth, each in in_tree(found, _name, _parent):
        below = min(depth + 1, DEEPEST)
        yield _generation(below, each) if isinstance(each, Call) else _span(below, each)


def _began(each: Any) -> float:
    moment = each.started if isinstance(each, Call) else each.start_time
    return float("-inf") if moment is None else moment


def _name(each: Any) -> str:
    return each.id if isinstance(each, Call) else each.span_id


def _parent(each: Any) -> str | None:
    return each.span_id if isinstance(each, Call) else each.parent_id


def _span(depth: int, row: Any) -> Bar:
    return Bar("span", depth, row.name, _state(row.body), row.start_time, row.end_time, reward=row.reward)


def _state(read: bytes | None) -> str:
    if read is None:
        return ""
    body = _decode(read)
    failed = attributes.has_failed(body["attributes"], body["status"]["status_code"])
    return "" if failed is None else "failed" if failed else "succeeded"


def _generation(depth: int, call: Call) -> Bar:
    counted = f"{call.prompt_ids} + {sum(each.token_ids for each in call.answers)} tokens"
    label = f"{call.endpoint or 'generation'}: {counted}"
    return Bar("generation", depth, label, call.status, call.started, call.finished, call.id, call.reward)


def _row(bar: Bar, start: float, end: float) -> Row:
    whole = (end - start) or 1.0
    begins = start if bar.start is None else bar.start
    ends = bar.end
    if ends is None:
        ends = end if bar.state in UNDER_WAY else begins
    # One that took no time, or is at the very end, can be seen all the same.
    left = min(100 * (begins - start) / whole, 100 - NARROWEST)
    width = min(max(100 * (ends - begins) / whole, NARROWEST), 100 - left)
    return Row(bar, round(left, 3), round(width, 3))
