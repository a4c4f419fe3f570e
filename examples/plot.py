"""Curves in a terminal, and in a PNG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["png", "terminal"]

HEIGHT, WIDTH = 10, 70
SIZE, MARGIN = (900, 420), 60
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))


def terminal(values: Sequence[float], title: str) -> str:
    """Draw values between 0 and 1 from left to right, a column for each or for the mean of several."""
    per_column = -(-len(values) // WIDTH)
    columns = [statistics.mean(values[start : start + per_column]) for start in range(0, len(values), per_column)]
    lines = [title]
    for level in range(HEIGHT, 0, -1):
        cells = "".join(_cell(value * HEIGHT - (level - 1)) for value in columns)
        lines.append(f"{level / HEIGHT:4.1f} |{cells}".rstrip())
    return "\n".join([*lines, f" 0.0 +{'-' * len(columns)}", f"      1{len(values):>{max(len(columns) - 1, 1)}}"])


def _cell(filled: float) -> str:
    return " ▁▂▃▄▅▆▇█"[round(8 * min(max(filled, 0.0), 1.0))]


def png(curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw the median of each kind's curves, with a band from the lower to the upper quartile."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image, "RGBA")
    steps = max(len(curve) for each in curves.values() for curve in each)
    right, bottom = SIZE[0] - MARGIN, SIZE[1] - MARGIN

    def point(step: int, value: float) -> tuple[float, float]:
        return (
            MARGIN + (right - MARGIN) * step / max(steps - 1, 1),
            bottom - (bottom - MARGIN / 2) * value,
        )

    for tenth in range(0, 11, 2):
        y = point(0, tenth / 10)[1]
        draw.line([(MARGIN, y), (right, y)], fill=(220, 220, 220))
        draw.text((MARGIN - 30, y - 6), f"{tenth / 10:.1f}", fill="black")
    for step in range(0, steps, max(steps // 6, 1)):
        draw.text((point(step, 0)[0] - 6, bottom + 8), f"{step + 1}", fill="black")
    draw.text((SIZE[0] / 2 - 20, bottom + 28), "step", fill="black")
    for place, (name, each) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        low, middle, high = zip(*(_quartiles(values) for values in zip(*each, strict=True)), strict=True)
        band = [point(step, value) for step, value in enumerate(low)]
        band += [point(step, value) for step, value in reversed([*enumerate(high)])]
        if len(each) > 1:
            draw.polygon(band, fill=(*colour, 50))
        draw.line([point(step, value) for step, value in enumerate(middle)], fill=colour, width=3)
        draw.text((right - 150, bottom - 60 + 16 * place), f"reward, rows: {name}", fill=colour)
    image.save(path)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
