"""A hook of MkDocs that puts linked files from outside `docs/`, and measurements, onto the site.

The same links work for readers of the pages in the repository. A measurement stands in one file only, which its
benchmark writes: the site has that file, and shows a table of it where a page has a comment that asks for it:

    <!-- measured: store.md: A generation on disk -->
    <!-- measured: every target -->
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
RESULTS = CHECKOUT / "benchmarks" / "results"

LINK = re.compile(r"(?<=\]\()[^()\s#]+")
MEASURED = re.compile(r"<!-- measured: (?:(?P<file>\S+): (?P<section>.+)|every target) -->")
HEADER, RULE = "|  | measured | 95 % interval | target | reached |", "|---|---:|---:|---:|---:|"

_sources: dict[str, Path] = {}
"""The source file of each page, by the page's name on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside `docs/` that pages link to, and the files that those link to."""
    _sources.clear()
    _sources.update({file.src_uri: DOCS / file.src_uri for file in files.documentation_pages()})
    waiting = [*_sources.values()]
    while waiting:
        source = waiting.pop()
        if source.suffix != ".md":
            continue
        for link in LINK.findall(MEASURED.sub(_measured, source.read_text())):
            target = _target(source, link)
            if target is None or target.is_relative_to(DOCS) or (uri := _uri(target)) in _sources:
                continue
            _sources[uri] = target
            waiting.append(target)
            content = _as_page(target)
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert measurements, and point links to the files' names on the site."""
    uri = page.file.src_uri

    def on_the_site(link: re.Match[str]) -> str:
        target = _target(_sources[uri], link[0])
        return link[0] if target is None else posixpath.relpath(_uri(target), posixpath.dirname(uri))

    return LINK.sub(on_the_site, MEASURED.sub(_measured, markdown))


def _target(source: Path, link: str) -> Path | None:
    """Return the file of the repository that a link leads to; None if it leads elsewhere."""
    target = (source.parent / link).resolve()
    return target if target.is_file() and target.is_relative_to(CHECKOUT) else None


def _uri(target: Path) -> str:
    """Return the name that a file of the repository has on the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    # MkDocs treats a README as the index page of its folder.
    name = f"repository/{target.relative_to(CHECKOUT).as_posix().replace('README', 'readme')}"
    return name if target.suffix == ".md" else f"{name}.md"


def _as_page(target: Path) -> str:
    text = target.read_text()
    if target.suffix == ".md":
        return text
    return f"# {target.relative_to(CHECKOUT)}\n\n````{target.suffix[1:]}\n{text}````\n"


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


def _sections(file: Path) -> list[Section]:
    _, *sections = file.read_text().split("\n## ")
    return [Section(*section.split("\n", 1)) for section in sections]


def _measured(comment: re.Match[str]) -> str:
    if comment["file"] is None:
        return "\n".join(_every_target())
    for section in _sections(RESULTS / comment["file"]):
        if section.title == comment["section"]:
            return section.text.strip()
    raise PluginError(f"nothing was measured as {comment[0]}")


def _every_target() -> Iterator[str]:
    for file in sorted(RESULTS.glob("*.md")):
        rows = [row for section in _sections(file) for row in section.targets]
        if rows:
            yield from ("", f"### [{file.stem}](../benchmarks/results/{file.name})", "", HEADER, RULE, *rows)
