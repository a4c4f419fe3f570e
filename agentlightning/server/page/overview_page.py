"""The overview: cards with a chart each, and the same by model, agent or worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.server.page.charts import Chart, line_of
from agentlightning.server.page.rendering import exact, number, seconds, short
from agentlightning.server.schemas import Part
from agentlightning.server.summaries import mark
from agentlightning.store import overview
from agentlightning.store.overview import Bin, Overview
from agentlightning.store.summaries import DIMENSIONS

__all__ = ["OverviewQuery", "overview_values"]

MINUTE, HOUR, DAY = 60, 3600, 86_400
TIMES: Mapping[str, float] = {"hour": HOUR, "day": DAY, "week": 7 * DAY, "month": 30 * DAY}
NAMES_SHOWN = 20
SECONDS_SHOWN = 60
"""Seconds that a chart is shown before the time in it has moved on."""

Time = Literal["auto", "hour", "day", "week", "month", "all"]
Of = Callable[[Bin], float | None]


class OverviewQuery(BaseModel):
    """The query parameters of the overview."""

    by: Literal["time", "step", "version"] = "time"
    time: Time = "auto"
    dimension: Literal["model", "agent", "worker"] = "model"
    name: Part = ""
    live: Literal["on", "off"] = "on"
    seen: Part = ""

    def address(self, **changes: Any) -> dict[str, Any]:
        """Return the parameters of an address of this page with changes, without those that say what holds anyway."""
        defaults = {"by": "time", "time": "auto", "dimension": "model", "name": "", "live": "on"}
        found = {name: changes.get(name, getattr(self, name)) for name in defaults}
        more = {name: value for name, value in changes.items() if name not in defaults}
        return {name: value for name, value in found.items() if value != defaults[name]} | more


@dataclass(frozen=True, slots=True)
class Card:
    """A measure: what it is in all, and its chart.

    Attributes:
        value: in all of the time, as text; None where it is unknown.
        about: what else there is to say of it.
        texts: of each point.
        low, high: the values at the bottom and the top of the chart, as texts.
        is_bars: whether it is drawn as bars, which stand for amounts, or as a line.
    """

    title: str
    value: str | None
    about: str
    chart: Chart
    texts: Sequence[str]
    low: str
    high: str
    is_bars: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A name in the table below: a model, an agent or a worker; `spark` is its mean reward as a path."""

    name: str
    whole: Bin
    spark: str


def overview_values(connection: Connection, query: OverviewQuery) -> dict[str, Any]:
    """Return the values for the template."""
    now = time.time()
    active = overview.activity(connection)
    found = None if active is None else _overview(connection, query, active, now)
    rows: list[Row] = []
    if found is not None and found.bins:
        divided = overview.by_name(connection, query.dimension, found, None if query.by == "time" else query.by)
        rows = [Row(name, each.whole, _spark(each)) for name, each in [*divided.items()][:NAMES_SHOWN]]
    return {
        "query": query,
        "is_empty": active is None,
        "overview": found,
        "span": _span(query, active, now),
        "cards": [] if found is None else _cards(found, query),
        "places": [] if found is None else [_place(each, query) for each in found.bins],
        "busy": []
        if found is None
        else [number for number, each in enumerate(found.bins) if each.rollouts or each.lost],
        "rows": rows,
        "dimensions": DIMENSIONS,
        "under_way": overview.under_way(connection),
        "mark": mark(connection, SECONDS_SHOWN),
    }


def _overview(connection: Connection, query: OverviewQuery, active: tuple[float, float], now: float) -> Overview:
    only = (query.dimension, query.name) if query.name else ("", None)
    if query.by != "time":
        return overview.by_axis(connection, query.by, *only)
    span = _span(query, active, now)
    since, until = active if span == "all" else (now - TIMES[span], now)
    return overview.of_time(connection, since, until, *only)


def _span(query: OverviewQuery, active: tuple[float, float] | None, now: float) -> str:
    """Choose the time to show: as given, or the shortest that has all; all of it if nothing happened lately."""
    if query.time != "auto" or active is None:
        return "day" if query.time == "auto" else query.time
    first, last = active
    fitting = next((name for name, length in TIMES.items() if now - first <= length), "all")
    return "all" if fitting == "all" or now - last > TIMES[fitting] / 4 else fitting


def _cards(found: Overview, query: OverviewQuery) -> list[Card]:
    whole = found.whole
    minutes = sum(each.end - each.start for each in found.bins) / MINUTE
    rate = query.by == "time"

    def amount(name: str) -> Callable[[Bin], float]:
        return lambda each: each.measures[name].amount if name in each.measures else 0.0

    def tokens(each: Bin) -> float:
        return amount("prompt_tokens")(each) + amount("output_tokens")(each)

    def rollouts(each: Bin) -> float:
        return each.ended / ((each.end - each.start) / MINUTE) if rate else float(each.ended)

    prompt, output = (short(amount(name)(whole)) for name in ("prompt_tokens", "output_tokens"))
    compared = whole.measures["breaks"].count
    cards = [
        _spread(found, "Mean reward", "reward", exact),
        _card(found, "Success", lambda each: each.success, _percent, "of rollouts that succeeded or failed", top=1.0),
        _card(
            found,
            "Rollouts a minute" if rate else "Rollouts",
            rollouts,
            exact if rate else short,
            f"{number(whole.ended)} ended",
            total=whole.ended / minutes if rate and minutes else float(whole.ended),
            is_bars=True,
        ),
        _card(found, "Tokens", tokens, short, f"{prompt} prompt, {output} output", total=tokens(whole), is_bars=True),
        _spread(found, "Seconds a call", "latency", seconds),
        _card(
            found,
            "Breaks",
            amount("breaks"),
            short,
            f"in {number(compared)} rollouts that were compared",
            total=amount("breaks")(whole),
            is_bars=True,
        ),
    ]
    calls = amount("calls")
    cards.insert(4, _card(found, "Calls", calls, short, "of these rollouts", total=calls(whole), is_bars=True))
    if rate and not query.name:
        about, lost = "that senders report", float(whole.lost)
        cards.append(_card(found, "Lost calls", lambda each: float(each.lost), short, about, total=lost, is_bars=True))
    return cards


def _spread(found: Overview, title: str, measure: str, shown: Callable[[float], str]) -> Card:
    """Make the card of a measure that each rollout has: its mean, between the quartiles."""

    def of(each: Bin) -> float | None:
        return each.measures[measure].mean if measure in each.measures else None

    def quartile(share: float) -> list[float | None]:
        return [each.measures[measure].quantile(share) if measure in each.measures else None for each in found.bins]

    low, high = quartile(0.25), quartile(0.75)
    whole = found.whole.measures[measure]
    edges = whole.quantile(0.25), whole.quantile(0.75)
    about = "" if None in edges else f"half between {shown(edges[0] or 0.0)} and {shown(edges[1] or 0.0)}"
    values = [of(each) for each in found.bins]
    known = [each for each in (*values, *low, *high) if each is not None]
    # The usual scale, if they fit it: a small difference does not look like a large one.
    floor, top = (0.0, 1.0) if measure == "reward" and known and min(known) >= 0 and max(known) <= 1 else (None, None)
    chart = Chart.of(values, low, high, floor=floor, top=top)
    texts = [
        "" if value is None else f"{shown(value)} ({shown(below or 0.0)} to {shown(above or 0.0)})"
        for value, below, above in zip(values, low, high, strict=True)
    ]
    value = None if whole.mean is None else shown(whole.mean)
    return Card(title, value, about, chart, texts, shown(chart.low), shown(chart.high), is_bars=False)


def _card(
    found: Overview,
    title: str,
    of: Of,
    shown: Callable[[float], str],
    about: str,
    *,
    total: float | None = None,
    top: float | None = None,
    is_bars: bool = False,
) -> Card:
    values = [of(each) for each in found.bins]
    chart = Chart.of(values, floor=0.0, top=top)
    total = of(found.whole) if total is None else total
    texts = ["" if each is None else shown(each) for each in values]
    value = None if total is None else shown(total)
    return Card(title, value, about, chart, texts, shown(chart.low), shown(chart.high), is_bars)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%"


def _spark(found: Overview) -> str:
    means = [each.measures["reward"].mean if "reward" in each.measures else None for each in found.bins]
    return line_of([each and (each.x, each.y) for each in Chart.of(means).points])


def _place(found: Bin, query: OverviewQuery) -> dict[str, Any]:
    """Return the filters of the list that show the rollouts of a bin."""
    only = {query.dimension: query.name} if query.name else {}
    if query.by != "time":
        return {query.by: found.name, **only}
    # The end is of the next one.
    moments = (datetime.fromtimestamp(each, timezone.utc) for each in (found.start, found.end - 0.001))
    return {"active": "..".join(f"{each:%Y-%m-%dT%H:%M:%S}.{each.microsecond // 1000:03}Z" for each in moments), **only}
