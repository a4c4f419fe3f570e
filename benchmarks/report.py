"""The report of a benchmark: tables for a terminal, for Markdown and as data."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

WIDTH = 120


def say(text: str) -> None:
    """Progress of a benchmark."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Summary:
    """Many measurements of one thing."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float] | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) == 1:
            return cls(values[0], (values[0], values[0]), None, 1)
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, (first, third), interval_of_median(values), len(values))


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The range of the true median, with 95 % confidence; None for five values and fewer, which cannot tell.

    As many values are below it as tosses of a coin are heads, whatever their distribution: so two of them bound it.
    """
    ordered, tosses = sorted(values), len(values)
    ways = itertools.accumulate(math.comb(tosses, heads) for heads in range(tosses))
    outside = sum(1 for so_many in ways if so_many / 2**tosses <= 0.025)
    return (ordered[outside - 1], ordered[-outside]) if outside else None


@dataclass(frozen=True)
class Target:
    """The most that a ratio should be; judged only where the quartiles of the ratios are closer than `max_spread`.

    Attributes:
        why: what keeps it from being reached, for a target that is missed.
    """

    limit: float
    at_least: bool = False
    max_spread: float = math.inf
    why: str = ""

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:.3f}"

    def verdict(self, ratios: Summary | None) -> str:
        if ratios is None:
            return ""
        if ratios.quartiles[1] - ratios.quartiles[0] > self.max_spread:
            return TOO_NOISY
        reached = ratios.median >= self.limit if self.at_least else ratios.median <= self.limit
        return REACHED if reached else MISSED


REACHED = "yes"
MISSED = "MISSED"
TOO_NOISY = "too noisy"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    values: Summary | None = None
    ratios: Summary | None = None
    target: Target | None = None
    note: str = ""

    @classmethod
    def of(cls, label: str, values: Sequence[float], references: Sequence[float], target: Target | None = None) -> Row:
        """Make a row with the ratios within each round.

        Both were measured right after each other, so a machine that is faster or slower for a while cancels out; in
        the ratio of two medians it does not.
        """
        ratios = [value / reference for value, reference in zip(values, references, strict=True)]
        return cls(label, Summary.of(values), Summary.of(ratios), target)

    @classmethod
    def of_difference(
        cls, label: str, values: Sequence[float], references: Sequence[float], target: Target | None = None
    ) -> Row:
        """Make a row with the differences within each round, of which the target says how large they should be."""
        return cls(label, Summary.of([value - of for value, of in zip(values, references, strict=True)]), None, target)

    @property
    def verdict(self) -> str:
        return self.target.verdict(self.ratios or self.values) if self.target else ""

    def cells(self, unit: str) -> list[str]:
        target = str(self.target or "")
        if self.values is None:
            return [self.label, "", "", "", "", "", target, ""]
        # Counted instructions are the same each time: quartiles would only repeat them.
        counted = unit == "millions"
        middle = f"{self.values.median:.3f}" if counted else readable(self.values.median)
        spread = "" if counted else " - ".join(map(readable, self.values.quartiles))
        if self.ratios is None:
            return [self.label, middle, spread, str(self.values.runs), "", "", target, self.verdict]
        # Nor is there anything to be unsure of where something is compared with itself.
        low, high = self.ratios.interval or (0.0, 0.0)
        interval = f"{low:.3f} - {high:.3f}" if low != high else ""
        ratio = f"{self.ratios.median:.3f}"
        return [self.label, middle, spread, str(self.values.runs), ratio, interval, target, self.verdict]


def readable(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    unit: str = ""
    about: str = ""
    rows: Sequence[Row] = ()
    skipped: str = ""

    @property
    def lines(self) -> list[list[str]]:
        """The header, and a line for each row."""
        header = ["", self.unit, "quartiles", "runs", "ratio", "95 % interval", "target", "reached"]
        return [header, *(row.cells(self.unit) for row in self.rows)] if self.rows else []

    @property
    def notes(self) -> list[str]:
        notes = [f"{row.label}: not measured: {row.note}" for row in self.rows if row.note]
        notes += [
            f"{row.label}: missed: {row.target.why}"
            for row in self.rows
            if row.target and row.target.why and row.verdict == MISSED
        ]
        return [self.skipped, *notes] if self.skipped else notes


@dataclass(frozen=True)
class Part:
    """The tables of one benchmark, and what holds for all of them."""

    title: str
    about: str
    sections: Sequence[Section]
    busy: str
    """The share of the machine that others had meanwhile."""

    @property
    def paragraph(self) -> list[str]:
        return textwrap.wrap(f"{self.about} Others kept {self.busy} of the machine busy meanwhile.".strip(), WIDTH)


RATIO = (
    "A ratio is to the first line of its table, or as it says there: the median of the ratios within each round, and "
    "the interval that holds the true one with 95 % confidence, if the rounds are independent."
)


@dataclass(frozen=True)
class Report:
    """All that is printed and written of one benchmark."""

    command: str
    machine: Mapping[str, str]
    part: Part

    def as_text(self) -> str:
        lines = [f"$ {self.command}", *(f"{name}: {value}" for name, value in self.machine.items())]
        every_line = [cells for section in self.part.sections for cells in section.lines]
        widths = [max(map(len, column)) for column in zip(*every_line, strict=True)]
        widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
        lines += ["", self.part.title.upper(), *self.part.paragraph]
        for section in self.part.sections:
            lines += ["", *textwrap.wrap(f"{section.title}. {section.about}", WIDTH)]
            lines += [in_columns(cells, widths) for cells in section.lines]
            lines += [wrapped for note in section.notes for wrapped in textwrap.wrap(note, WIDTH)]
        lines += ["", *textwrap.wrap(RATIO, WIDTH), self.verdict(), ""]
        return "".join(f"{line.rstrip()}\n" for line in lines)

    def as_markdown(self) -> str:
        lines = [f"# {self.part.title}", ""]
        lines += ["Written by the command below; run it to have it written again.", ""]
        lines += ["```bash", self.command, "```", ""]
        lines += [f"- {name}: {value}" for name, value in self.machine.items()]
        lines += ["", *self.part.paragraph, "", *textwrap.wrap(RATIO, WIDTH), self.verdict()]
        for section in self.part.sections:
            lines += ["", f"## {section.title}", ""]
            lines += [section.about, ""] if section.about else []
            lines += in_markdown(section.lines)
            lines += [line for note in section.notes for line in ("", note)]
        return "".join(f"{line}\n" for line in lines)

    def as_data(self) -> dict[str, object]:
        return {
            "command": self.command,
            "machine": dict(self.machine),
            "sections": [{**asdict(section), "notes": section.notes} for section in self.part.sections],
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        sections = self.part.sections
        verdicts = [row.verdict for section in sections for row in section.rows if row.target]
        noisy, skipped = verdicts.count(TOO_NOISY), sum(1 for section in sections if section.skipped)
        judged = f"{verdicts.count(REACHED)} of {len(verdicts) - noisy} targets reached"
        others = {"too noisy to judge": noisy, "tables skipped": skipped}
        return "; ".join([judged, *(f"{number} {what}" for what, number in others.items() if number)]) + "."


def in_columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell[:width].ljust(width) if number == 0 else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others])


def in_markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    header, *others = [f"| {' | '.join(cells)} |" for cells in lines]
    return [header, "|---|" + "---:|" * (len(lines[0]) - 1), *others]
