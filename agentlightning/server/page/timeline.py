"""The timeline of a rollout: its attempts, the spans of each as a tree, and generations below the spans naming them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
from sqlalchemy import Connection

from agentlightning.server.page.conversation import Call
from agentlightning.store import attributes
from agentlightning.store.rollouts import attempts_of
from agentlightning.store.spans import outlines

__all__ = ["MAX_DEPTH", "Bar", "Row", "Timeline", "in_tree", "timeline_of"]

SPANS_SHOWN = 1000
# Bytes of a span: the page reloads every few seconds, and a prompt with its ids may take MiBs.
LARGEST_READ = 64 << 10
# Percent of the timeline.
MIN_WIDTH = 0.4
MAX_DEPTH = 12
"""Deepest level that the stylesheet indents; deeper ones are indented as much."""
UNFINISHED = ("preparing", "running")

T = TypeVar("T")

_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class Bar:
    """An attempt, a span or a generation: something with a start and an end.

    Attributes:
        kind: `attempt`, `span` or `generation`.
        state: its status in the store; empty if none is recorded, or if the span is larger than `LARGEST_READ`.
        start, end: seconds since the epoch; None if unknown, or if it has not happened yet.
        generation_id: the generation that the bar links to.
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
    """A bar, its left edge and its width, in percent of the timeline."""

    bar: Bar
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows from top to bottom, the times they lie between, and the number of spans left out."""

    rows: Sequence[Row]
    start: float
    end: float
    spans_left_out: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


def timeline_of(connection: Connection, rollout_id: str, rollout: Any | None, calls: Sequence[Call]) -> Timeline:
    """Return the timeline of a rollout.

    Args:
        rollout: its row; None if it is known only from its calls and spans.
        calls: its generations.
    """
    attempts = [] if rollout is None else attempts_of(connection, rollout.key)
    spans = outlines(connection, rollout_id, SPANS_SHOWN + 1, LARGEST_READ)
    bars = list(_bars(attempts, spans[:SPANS_SHOWN], calls))
    times = [each for bar in bars for each in (bar.start, bar.end) if each is not None]
    start, end = (min(times), max(times)) if times else (0.0, 0.0)
    if any(bar.state in UNFINISHED for bar in bars):
        end = max(end, time.time())
    return Timeline([_row(bar, start, end) for bar in bars], start, end, max(len(spans) - SPANS_SHOWN, 0))


def _bars(attempts: Sequence[Any], spans: Sequence[Any], calls: Sequence[Call]) -> Iterator[Bar]:
    known = {each.attempt_id: each for each in attempts}
    # Attempts that only spans and calls name come after the known ones.
    ids = [*known, *(each.attempt_id for each in (*spans, *calls))]
    for attempt_id in dict.fromkeys(ids):
        attempt_spans = [each for each in spans if each.attempt_id == attempt_id]
        attempt_calls = [each for each in calls if each.attempt_id == attempt_id]
        bars = list(_below(attempt_spans, attempt_calls))
        yield _attempt(attempt_id, known.get(attempt_id), bars)
        yield from bars


def _attempt(attempt_id: str | None, found: Any | None, bars: Sequence[Bar]) -> Bar:
    times = [each for bar in bars for each in (bar.start, bar.end) if each is not None]
    if found is None:
        label = f"Attempt {attempt_id}" if attempt_id else "Calls that name no attempt"
        return Bar("attempt", 0, label, "", min(times, default=None), max(times, default=None))
    end = found.end_time
    if end is None and found.status not in UNFINISHED:
        # An abandoned attempt has no end: the last sign of life is the closest known time.
        end = max(found.last_heartbeat_time or found.start_time, *times, found.start_time)
    return Bar("attempt", 0, f"Attempt {found.sequence_id}: {attempt_id}", found.status, found.start_time, end)


def _below(spans: Sequence[Any], calls: Sequence[Call]) -> Iterator[Bar]:
    """Yield spans as a tree, each generation below the span that names it, the others by their start."""
    found = sorted([*spans, *calls], key=_began)
    for depth, each in in_tree(found, _name, _parent):
        below = min(depth + 1, MAX_DEPTH)
        yield _generation(below, each) if isinstance(each, Call) else _span(below, each)


def _began(each: Any) -> float:
    start = each.started if isinstance(each, Call) else each.start_time
    return float("-inf") if start is None else start


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
    tokens = f"{call.prompt_ids} + {sum(each.token_ids for each in call.answers)} tokens"
    label = f"{call.endpoint or 'generation'}: {tokens}"
    return Bar("generation", depth, label, call.status, call.started, call.finished, call.id, call.reward)


def _row(bar: Bar, start: float, end: float) -> Row:
    whole = (end - start) or 1.0
    begins = start if bar.start is None else bar.start
    ends = bar.end
    if ends is None:
        ends = end if bar.state in UNFINISHED else begins
    # A bar without a duration, or at the very end, stays visible.
    left = min(100 * (begins - start) / whole, 100 - MIN_WIDTH)
    width = min(max(100 * (ends - begins) / whole, MIN_WIDTH), 100 - left)
    return Row(bar, round(left, 3), round(width, 3))


def in_tree(found: Sequence[T], name: Callable[[T], str], parent: Callable[[T], str | None]) -> Iterator[tuple[int, T]]:
    """Yield each item once with its depth: parents before their children, siblings in the given order.

    An item whose parent is not among them is at the top, and so is the first item of a cycle.
    """
    known = {name(each) for each in found}
    children: defaultdict[str | None, list[T]] = defaultdict(list)
    for each in found:
        above = parent(each)
        children[above if above in known else None].append(each)
    shown: set[int] = set()
    for root in [*children[None], *found]:
        waiting = [(0, root)]
        while waiting:
            depth, each = waiting.pop()
            if id(each) not in shown:
                shown.add(id(each))
                yield depth, each
                waiting += ((depth + 1, child) for child in reversed(children[name(each)]))
