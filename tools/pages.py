"""A hook of MkDocs that puts linked files from outside `docs/` onto the site.

The same links work for readers of the pages in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"

LINK = re.compile(r"(?<=\]\()[^()\s#]+")

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
        for link in LINK.findall(source.read_text()):
            target = _target(source, link)
            if target is None or target.is_relative_to(DOCS) or (uri := _uri(target)) in _sources:
                continue
            _sources[uri] = target
            waiting.append(target)
            content = _as_page(target)
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the files' names on the site."""
    uri = page.file.src_uri

    def on_the_site(link: re.Match[str]) -> str:
        target = _target(_sources[uri], link[0])
        return link[0] if target is None else posixpath.relpath(_uri(target), posixpath.dirname(uri))

    return LINK.sub(on_the_site, markdown)


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
