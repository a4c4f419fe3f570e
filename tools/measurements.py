"""Tables of `benchmarks/results` in the pages of `docs/`: `python -m tools.measurements` writes them again.

Each table stands below a comment that names it, up to the next `<!-- end -->`:

    <!-- measured: store.md: A generation on disk -->
    <!-- measured: every target -->
    <!-- measured: missed targets -->

The numbers come from the files that the benchmarks write, which call this module after they have written one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["insert_into", "update_pages"]

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
RESULTS = CHECKOUT / "benchmarks" / "results"

MEASURED = re.compile(
    r"(?P<comment><!-- measured: (?:(?P<file>\S+): (?P<section>[^\n]+)|(?P<which>every target|missed targets)) -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)
MISSED = "MISSED"
HEADER, RULE = "|  | measured | 95 % interval | target | reached |", "|---|---:|---:|---:|---:|"


def update_pages() -> list[Path]:
    """Write the tables of all pages again; return the pages that have changed.

    Raises:
        ValueError: a comment names a table that no benchmark has written.
    """
    changed = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if (new := insert_into(text)) != text:
            page.write_text(new)
            changed.append(page)
    return changed


def insert_into(page: str) -> str:
    """Return the text of a page with its tables as the benchmarks have written them.

    Raises:
        ValueError: a comment names a table that no benchmark has written, or its end is missing.
    """
    if page.count("<!-- measured: ") != len(MEASURED.findall(page)):
        raise ValueError("a comment `measured` has no `<!-- end -->`, or names no table")
    return MEASURED.sub(lambda found: f"{found['comment']}\n{_table(found).strip()}\n\n{found['end']}", page)


@dataclass(frozen=True)
class Section:
    """A table of a benchmark, with its text."""

    title: str
    text: str

    @property
    def targets(self) -> Iterator[str]:
        """Rows of the table that have a target."""
        unit = ""
        for line in self.text.splitlines():
            if line.startswith("| "):
                label, value, _, _, ratio, interval, target, reached = (cell.strip() for cell in line[1:-1].split("|"))
                if target == "target":
                    unit = value
                elif target:
                    measured = ratio or f"{value} {unit}"
                    yield f"| {self.title}: {label} | {measured} | {interval} | {target} | {reached} |"

    def why(self, label: str) -> str:
        """Return the reason that the benchmark gives for a row that has missed its target."""
        begin = f"{label}: missed: "
        return next((line.removeprefix(begin) for line in self.text.splitlines() if line.startswith(begin)), "")


def _sections(file: Path) -> list[Section]:
    _, *sections = file.read_text().split("\n## ")
    return [Section(*section.split("\n", 1)) for section in sections]


def _table(comment: re.Match[str]) -> str:
    if comment["which"]:
        return "\n".join(_every_target() if comment["which"] == "every target" else _missed_targets())
    for section in _sections(RESULTS / comment["file"]):
        if section.title == comment["section"]:
            return section.text
    raise ValueError(f"nothing was measured as {comment['comment'].strip()}")


def _missed_targets() -> Iterator[str]:
    """Yield one table of all rows that have missed their targets, each with the reason that its benchmark gives."""
    yield from ("| missed | measured | target | why |", "|---|---:|---:|---|")
    for file in sorted(RESULTS.glob("*.md")):
        for section in _sections(file):
            for row in section.targets:
                label, measured, _, target, reached = (cell.strip() for cell in row[1:-1].split("|"))
                if reached == MISSED:
                    why = section.why(label.removeprefix(f"{section.title}: "))
                    link = f"[{file.stem}](../benchmarks/results/{file.name})"
                    yield f"| {link}: {label} | {measured} | {target} | {why} |"


def _every_target() -> Iterator[str]:
    for file in sorted(RESULTS.glob("*.md")):
        rows = [row for section in _sections(file) for row in section.targets]
        if rows:
            yield from ("", f"### [{file.stem}](../benchmarks/results/{file.name})", "", HEADER, RULE, *rows)


if __name__ == "__main__":
    for page in update_pages():
        sys.stdout.write(f"wrote {page.relative_to(CHECKOUT)}\n")
