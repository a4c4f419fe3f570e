"""The documentation as a site: it loads nothing from other hosts, has no dead link, and names every switch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import expect

import agentlightning
from agentlightning.cli import COMMANDS
from agentlightning.settings import VARIABLES
from benchmarks.report import Part, Report, Row, Section, Target
from tests.common.browser import MISSING, chromium, program
from tests.common.environments import CHECKOUT, run
from tests.common.http_server import serving
from tools import measurements

SWITCHES = CHECKOUT / "docs" / "switches.md"
RESULTS = sorted((CHECKOUT / "benchmarks" / "results").glob("*.md"))
# What a page is built of.
SOURCES = (
    "mkdocs.yml",
    "README.md",
    "README.zh.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "_agentlightning.py",
    "agentlightning",
    "docs",
    "examples",
    "benchmarks",
    "tools",
)

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OUTSIDE = re.compile(r"^(?:https?:)?//")
IN_STYLES = re.compile(r"url\(\s*[\"']?(?:https?:)?//|@import")
TARGET = re.compile(r"^\|.*\| [≤≥] [\d.]+ \|.*$", re.MULTILINE)


class Parsed(HTMLParser):
    """A page: what it loads, where it leads, and what can be led to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        leads = self.links if tag == "a" else self.loads
        leads += [found[name] for name in ("href", "src", "srcset", "data", "action") if name in found]


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site))
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The site, and what was printed while it was built."""
    folder = tmp_path_factory.mktemp("site")
    result = build(CHECKOUT, folder)
    assert result.returncode == 0, result.stdout
    return folder, result.stdout


@pytest.fixture(scope="module")
def site(built: tuple[Path, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Parsed]:
    return {page: Parsed(page) for page in site.rglob("*.html")}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """All that the site is built of, to be broken."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in SOURCES:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def test_build_warns_of_nothing(built: tuple[Path, str]) -> None:
    lines = built[1].splitlines()

    assert lines
    assert [line for line in lines if not line.startswith("INFO ")] == []
    # `make docs` builds in the same way.
    assert "NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict " in (CHECKOUT / "Makefile").read_text()


def test_site_opened_from_a_disk_says_what_its_search_needs(site: Path) -> None:
    if (found := program()) is None:
        pytest.skip(MISSING)
    with chromium(found) as browser:
        page = browser.new_page()
        page.goto((site / "performance.html").as_uri())

        expect(page.get_by_text("Search needs a server: run mkdocs serve")).to_be_visible()


def test_site_that_is_served_can_be_searched(site: Path) -> None:
    if (found := program()) is None:
        pytest.skip(MISSING)
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with serving(handler) as url, chromium(found) as browser:
        page = browser.new_page()
        # Typed before the scripts run, a text is not searched for.
        page.goto(f"{url}/index.html?q=heartbeat")

        expect(page.locator(".md-search-result__meta")).to_contain_text("matching documents")
        expect(page.get_by_text("Search needs a server")).to_have_count(0)


@pytest.mark.tier("check")
@pytest.mark.parametrize("page", sorted((CHECKOUT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_page_in_the_repository_has_the_tables_that_the_benchmarks_wrote(page: Path) -> None:
    text = page.read_text()

    assert measurements.insert_into(text) == text, "run python -m tools.measurements"


@pytest.mark.tier("check")
def test_pages_with_numbers_show_them_without_the_site() -> None:
    shown = (CHECKOUT / "docs" / "performance.md").read_text()
    missed, shown = shown.split("<!-- measured: every target -->")
    every_target = {row for result in RESULTS for row in TARGET.findall(result.read_text())}

    assert len(TARGET.findall(shown)) == len(every_target) > 20
    assert len(TARGET.findall(missed)) == len([row for row in every_target if row.endswith("| MISSED |")])
    assert (CHECKOUT / "docs" / "operations.md").read_text().count("| quartiles |") == 5


@pytest.mark.tier("check")
@pytest.mark.parametrize(
    "page",
    ["<!-- measured: store.md: Nothing that was measured -->\n<!-- end -->\n", "<!-- measured: every target -->\n"],
    ids=["unknown table", "no end"],
)
def test_comment_that_names_no_table_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="measured"):
        measurements.insert_into(page)


@pytest.mark.tier("check")
def test_old_table_is_replaced() -> None:
    page = "before\n<!-- measured: every target -->\n\n| old |\n\n<!-- end -->\nafter\n"
    new = measurements.insert_into(page)

    assert "old" not in new
    assert new.startswith("before\n<!-- measured: every target -->\n\n### [")
    assert new.endswith(" |\n\n<!-- end -->\nafter\n")
    assert measurements.insert_into(new) == new


@pytest.mark.tier("check")
def test_a_missed_target_is_shown_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(1.0, why="there is more to do.")
    section = Section("a turn", "ms", rows=[Row.of(name, [2.0], [of], target) for name, of in (("a", 1.0), ("b", 2.0))])
    report = Report("python -m benchmarks nothing", {}, Part("Nothing", "", [section], "0%"))
    (tmp_path / "nothing.md").write_text(report.as_markdown())
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)

    page = measurements.insert_into("<!-- measured: missed targets -->\n<!-- end -->\n")

    row = "| [nothing](../benchmarks/results/nothing.md): a turn: a | 2.000 | ≤ 1.000 | there is more to do. |"
    assert [line for line in page.splitlines() if "nothing" in line] == [row]


def test_every_page_of_the_documentation_is_on_the_site(site: Path) -> None:
    written = {page.stem for page in (CHECKOUT / "docs").glob("*.md")}

    assert {page.stem for page in site.glob("*.html")} - {"404"} == written


def test_the_page_of_the_api_has_every_public_name(pages: dict[Path, Parsed], site: Path) -> None:
    described = {name for name in pages[site / "api.html"].ids if name.startswith("agentlightning.")}

    assert {f"agentlightning.{name}" for name in agentlightning.__all__} - described == {"agentlightning.__version__"}


def test_a_page_loads_nothing_from_another_host(site: Path, pages: dict[Path, Parsed]) -> None:
    assert pages
    assert not {load for page in pages.values() for load in page.loads if OUTSIDE.match(load)}
    styles = list(site.rglob("*.css"))
    assert styles
    assert not [style for style in styles if IN_STYLES.search(style.read_text())]


def test_every_link_within_the_site_leads_to_something_on_it(site: Path, pages: dict[Path, Parsed]) -> None:
    followed = 0
    for page, parsed in pages.items():
        # It does not know from where it is shown.
        if page == site / "404.html":
            continue
        for link in [*parsed.links, *parsed.loads]:
            parts = urlsplit(link)
            if parts.scheme or not link:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__skip"}, f"{page}: {link}"
            followed += 1
    assert followed > 100


def test_what_the_pages_lead_to_outside_of_docs_is_on_the_site(site: Path, pages: dict[Path, Parsed]) -> None:
    for name in ("CONTRIBUTING.html", "examples/loop.py.html", "benchmarks/results/store.html"):
        assert site / "repository" / name in pages


def test_the_site_has_every_target_of_every_benchmark(site: Path, pages: dict[Path, Parsed]) -> None:
    targets = [row for result in RESULTS for row in TARGET.findall(result.read_text())]
    verdicts = [[cell.strip() for cell in row.split("|")][-2] for row in targets]

    rows = re.findall(r"<tr>(.*?)</tr>", (site / "performance.html").read_text(), re.DOTALL)
    shown = [cells[-1] for row in rows if len(cells := re.findall(r"<td[^>]*>(.*?)</td>", row)) == 5]

    assert shown
    assert shown == verdicts
    links = pages[site / "performance.html"].links
    assert all(f"repository/benchmarks/results/{result.stem}.html" in links for result in RESULTS)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("[nothing](nothing.md)", "nothing.md"),
        ("[no heading](answers.md#no-heading)", "no-heading"),
        ("[not on the site](/answers.md)", "/answers.md"),
        ("[beyond docs](../README.md#no-heading)", "no-heading"),
    ],
)
def test_what_leads_nowhere_is_not_built(wrong: str, complaint: str, copy: Path, tmp_path: Path) -> None:
    page = copy / "docs" / "index.md"
    page.write_text(f"{page.read_text()}\n{wrong}\n")

    result = build(copy, tmp_path / "site")

    assert result.returncode != 0
    assert complaint in result.stdout


def sections() -> dict[str, str]:
    """The page of switches by heading."""
    _, *found = SWITCHES.read_text().split("\n## ")
    return dict(section.split("\n", 1) for section in found)


def test_the_page_of_switches_has_every_variable_with_its_default() -> None:
    rows = {row[0]: row for row in rows_of(sections()["Variables"])}

    assert rows.keys() == {f"`{name}`" for name in VARIABLES}
    for name, variable in VARIABLES.items():
        assert variable.default in rows[f"`{name}`"][1]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "vllm"])
def test_the_page_of_switches_has_every_option_of_a_command_and_no_other(command: str) -> None:
    found = set(OPTION.findall(run(sys.executable, "-m", "agentlightning", command, "--help")))
    page = sections()
    told = page["agl"] + page[f"agl {command}"] + (page["agl store"] if command == "agentops" else "")
    named = {option for row in rows_of(told) for option in OPTION.findall(row[0])} | set(OPTION.findall(page["agl"]))

    assert named == found


def test_the_page_of_switches_has_every_command() -> None:
    page = sections()
    named = {row[0] for row in rows_of(page["agl"])}

    for command in COMMANDS:
        assert any(f"`agl {command}`" in name for name in named)


def rows_of(section: str) -> Iterator[list[str]]:
    """The cells of its tables, without their headers."""
    for table in re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n?)+)", section, re.MULTILINE):
        for row in table.splitlines():
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
