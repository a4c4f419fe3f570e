"""Charts as SVG: points, lines and bands in percent of a chart, so that a browser fits them to any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Chart", "Point", "line_of"]

TOP, BOTTOM = 4.0, 98.0
"""Positions of the highest and the lowest value, in percent."""
WIDEST = 0.8
"""Share of its place that a bar takes."""

Values = Sequence[float | None]


class Point(NamedTuple):
    """A value in a chart.

    Attributes:
        left, width: the part of the chart that is its own.
        x, y: its middle.
        bar: left edge, width and height of a bar for it.
    """

    left: float
    width: float
    x: float
    y: float
    bar: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Content of a chart.

    Attributes:
        low, high: values at the bottom and at the top.
        points: one for each value; None where it is unknown.
        line: a path through them.
        band: the paths around those that have quartiles.
    """

    low: float
    high: float
    points: Sequence[Point | None]
    line: str
    band: str

    @classmethod
    def of(
        cls,
        values: Values,
        lower: Values = (),
        upper: Values = (),
        *,
        floor: float | None = None,
        top: float | None = None,
    ) -> Chart:
        """Draw values.

        Args:
            lower, upper: edges of a band around each.
            floor, top: values that the chart shows at least.
        """
        known = [each for each in (*values, *lower, *upper, floor, top) if each is not None]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if low == high:
            low, high = (low, low + 1) if floor is not None and low >= floor else (low - 0.5, high + 0.5)
        place = 100 / max(len(values), 1)

        def y(value: float) -> float:
            return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 2)

        points = [None if each is None else _point(number, place, y(each)) for number, each in enumerate(values)]
        edges = [
            None if below is None or above is None else (round((number + 0.5) * place, 2), y(below), y(above))
            for number, (below, above) in enumerate(zip(lower, upper, strict=True))
        ]
        return cls(low, high, points, line_of([each and (each.x, each.y) for each in points]), _band(edges))


def _point(number: int, place: float, y: float) -> Point:
    left, width = round(number * place, 2), round(place, 2)
    bar = round(left + place * (1 - WIDEST) / 2, 2), round(place * WIDEST, 2), max(round(BOTTOM - y, 2), 0.0)
    return Point(left, width, round((number + 0.5) * place, 2), y, bar)


def line_of(points: Sequence[tuple[float, float] | None]) -> str:
    """Return the path of a line through points, with a gap where one is unknown, and a dash for a point on its own."""
    parts: list[str] = []
    for run in _runs(points):
        if len(run) == 1:
            run = [(run[0][0] - 0.4, run[0][1]), (run[0][0] + 0.4, run[0][1])]
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in run))
    return "".join(parts)


def _band(edges: Sequence[tuple[float, float, float] | None]) -> str:
    parts: list[str] = []
    for run in _runs(edges):
        if len(run) == 1:
            x, below, above = run[0]
            run = [(x - 0.4, below, above), (x + 0.4, below, above)]
        around = [*((x, above) for x, _, above in run), *((x, below) for x, below, _ in reversed(run))]
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in around) + "Z")
    return "".join(parts)


def _runs(values: Sequence[tuple[float, ...] | None]) -> Iterator[list[tuple[float, ...]]]:
    """Yield the values that follow one another without a gap."""
    run: list[tuple[float, ...]] = []
    for each in values:
        if each is not None:
            run.append(each)
        elif run:
            yield run
            run = []
    if run:
        yield run
