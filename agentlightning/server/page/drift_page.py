"""The page of drift: causes as bars over time; and the trees of a rollout's prompts, with their breaks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.drift import ABOUT, MEANT, About, AttemptDrift, Break
from agentlightning.server.page.timeline import MAX_DEPTH
from agentlightning.server.schemas import Part
from agentlightning.store import drift_index
from agentlightning.store.drift_index import CauseCount

__all__ = ["CALLS_COMPARED", "IDS_COMPARED", "DriftQuery", "Line", "Tree", "drift_values", "trees_of"]

BARS = 48
CALLS_COMPARED, IDS_COMPARED = 1_000, 1 << 22
"""Most calls of a rollout that are compared for a page, and most ids of their prompts while its page loads."""
# A line with a break has both of its sides.
LINES_SHOWN = 200
HOURS: Mapping[str, int] = {"hour": 1, "day": 24, "week": 7 * 24, "month": 30 * 24}
NANOSECONDS_OF_AN_HOUR = 3600 * 10**9


class DriftQuery(BaseModel):
    """The query parameters of the page."""

    time: Literal["hour", "day", "week", "month"] = "day"
    model: Part = ""
    agent: Part = ""


@dataclass(frozen=True, slots=True)
class CauseRow:
    """A cause in a row of the table.

    Attributes:
        bars: its breaks in each part of the time, as percentages of the most that any cause has.
    """

    count: CauseCount
    about: About
    is_meant: bool
    bars: Sequence[float]


@dataclass(frozen=True, slots=True)
class Box:
    """A call in the tree; `depth` is how many calls its conversation has before it."""

    generation_id: str
    number: int
    depth: int


@dataclass(frozen=True, slots=True)
class Line:
    """Calls that continue one another, from left to right.

    Attributes:
        indent: as the stylesheet indents.
        broken: what broke the prompt of its first call; None where that is exact, or begins a conversation.
        parent: number of the call that it branched from; None where it begins anew.
    """

    boxes: Sequence[Box]
    indent: int
    broken: Break | None
    about: About | None
    is_drift: bool
    parent: int | None


@dataclass(frozen=True, slots=True)
class Tree:
    """The first lines of an attempt's prompts, and the number of lines left out."""

    attempt_id: str | None
    lines: Sequence[Line]
    left_out: int


def drift_values(connection: Connection, query: DriftQuery) -> dict[str, Any]:
    """Return the values for the template of the page."""
    until = time.time_ns()
    since = until - HOURS[query.time] * NANOSECONDS_OF_AN_HOUR
    only = {name: value for name, value in (("model", query.model), ("agent_id", query.agent)) if value}
    counts, names = drift_index.counts(connection, since, until, BARS, **only)
    most = max((bar for each in counts for bar in each.bars), default=0)
    found = [
        CauseRow(each, ABOUT[each.cause], each.cause in MEANT, [round(100 * bar / most, 1) for bar in each.bars])
        for each in counts
    ]
    totals = drift_index.totals(connection)
    return {
        "query": query,
        "causes": found,
        "models": names["model"],
        "agents": names["agent_id"],
        "times": [*HOURS],
        "kept": totals["kept"],
        "lost": totals["lost"],
        "parts": BARS,
    }


def trees_of(attempts: Sequence[AttemptDrift]) -> list[Tree]:
    """Return the tree of each attempt that has calls."""
    found = [(each.attempt_id, [*_lines_of(each)]) for each in attempts if each.parents]
    return [Tree(attempt_id, lines[:LINES_SHOWN], max(len(lines) - LINES_SHOWN, 0)) for attempt_id, lines in found]


def _lines_of(attempt: AttemptDrift) -> Iterator[Line]:
    numbers = {each: number for number, each in enumerate(attempt.parents, 1)}
    breaks = {each.generation_id: each for each in attempt.breaks}
    children: defaultdict[str | None, list[str]] = defaultdict(list)
    for each, parent in attempt.parents.items():
        children[parent].append(each)
    waiting = [(each, 0) for each in reversed(children[None])]
    while waiting:
        first, depth = waiting.pop()
        boxes = [Box(first, numbers[first], depth)]
        branches: list[tuple[str, int]] = []
        while following := children[boxes[-1].generation_id]:
            # An exact continuation stays in the line; what breaks, and all other branches, are below.
            straight = next((each for each in following if each not in breaks), None)
            below = boxes[-1].depth + 1
            branches += ((each, below) for each in following if each != straight)
            if straight is None:
                break
            boxes.append(Box(straight, numbers[straight], below))
        broken = breaks.get(first)
        parent = attempt.parents[first]
        yield Line(
            boxes,
            min(depth, MAX_DEPTH),
            broken,
            None if broken is None else ABOUT[broken.cause],
            broken is not None and broken.cause not in MEANT,
            None if parent is None else numbers[parent],
        )
        waiting += reversed(branches)
