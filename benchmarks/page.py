"""The page of `agl store` in a browser: how soon it is there, how soon it answers, and whether it scrolls evenly.

What would make such numbers lie, and what is done about it:

- Browser, server and whoever measures share the machine. So small and large take turns, and what counts is their ratio
  in the same round.
- A second visit has everything at hand. So each is that of somebody new, whose browser has nothing of the store.
- Who drives a browser from outside waits for the way there and back. So all moments are taken within it.
- No machine of these has a graphics card, and a processor draws more slowly. So frames are those of the slower kind.
"""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from playwright.sync_api import Browser, Page

from agentlightning.store import drift_index, open_database
from benchmarks.environments import interleaved
from benchmarks.lightning_store import agl_store
from benchmarks.load import HOST
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say
from tests.common.browser import MISSING, Visit, chromium, program
from tests.common.rollouts import Rollout, conversation, fill, long_generation, long_prompts

ROUNDS, QUICK_ROUNDS = 15, 5
FEW, MANY = 100, 100_000
SOME_GENERATIONS, MANY_GENERATIONS = 1_000, 1_000_000
CALLS_OF_A_ROLLOUT = 10
SHORT, LONG = 1_024, 32_768
FEW_CALLS, MANY_CALLS = 10, 200
CHARACTERS = 300_000
BYTES_LIMIT = 2_000_000
FRAMES, PIXELS = 120, 300
KEYS = 10
LONG_FRAME = 50
LIVE = Target(0.1)
SECONDS_LOOKED, QUICK_SECONDS_LOOKED = 60, 10

# Before any script of the page. It is ready when all of these have run, and the browser has nothing left to do.
READY = """
window.isReady = new Promise((resolve) => {
  addEventListener("load", () => requestAnimationFrame(() => setTimeout(() => resolve(performance.now()))));
});
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SCROLLED = """
async ([frames, pixels]) => {
  const frame = () => new Promise(requestAnimationFrame);
  const lasted = [];
  let last = await frame();
  for (let number = 0; number < frames; number++) {
    const before = scrollY;
    scrollBy({ top: pixels, behavior: "instant" });
    // At the end, and back at the beginning.
    if (scrollY === before) pixels = -pixels;
    const now = await frame();
    lasted.push(now - last);
    last = now;
  }
  return lasted;
}
"""
SEARCHED = """
async (text) => {
  const found = new Promise((resolve) => {
    const observer = new MutationObserver(() => {
      if (!/ rollouts? found/.test(document.body.innerText)) return;
      observer.disconnect();
      requestAnimationFrame(() => setTimeout(resolve));
    });
    observer.observe(document.body, { subtree: true, childList: true, characterData: true });
  });
  const input = document.querySelector("input[type=search]");
  const started = performance.now();
  input.value = text;
  input.dispatchEvent(new Event("input", { bubbles: true }));
  await found;
  return performance.now() - started;
}
"""
UNFOLDED = """
async () => {
  const started = performance.now();
  document.querySelector(".call summary").click();
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  return performance.now() - started;
}
"""
FETCHED = """
async () => {
  const started = performance.now();
  await (await fetch(location.href, { cache: "no-store" })).text();
  return performance.now() - started;
}
"""
PRESSED = """
async (times) => {
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  const answer = document.querySelector(".tokens");
  const lasted = [];
  answer.focus();
  for (let number = 0; number < times; number++) {
    await frame();
    const started = performance.now();
    answer.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
    await frame();
    lasted.push(performance.now() - started);
  }
  return lasted;
}
"""

ABOUT = (
    "Chromium without a window and without a graphics card, 1,440 by 900 pixels, on the machine of the store. Each "
    "visit is the first of its browser, to the list of so many rollouts, to the overview of so many generations, to a "
    "generation of so many tokens with their logprobs, or to a rollout of so many calls; a ratio is to the row above."
)


@dataclass(frozen=True)
class Visited:
    """Times that a visitor waited, in milliseconds.

    Attributes:
        painted: from the address until there was something to read.
        ready: until all of it was there, and every script had run.
        answered: from a key until what it had done was shown.
        frames: while scrolling, each.
    """

    painted: float
    ready: float
    answered: float
    frames: Sequence[float]


@dataclass(frozen=True)
class Kind:
    """A kind of page that is visited.

    Attributes:
        is_large: whether it has more than the one before it, to which it is compared.
        answered: does what is answered, and gives the milliseconds.
    """

    label: str
    is_large: bool
    address: str
    answered: Callable[[Page], float]


def measure(quick: bool) -> Part:
    """Everything, of stores that are gone afterwards."""
    found = program()
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with busy.running():
        if found is None:
            say(MISSING)
            sections = [Section("First paint", "ms", rows=[Row("each page", note=MISSING)])]
        else:
            with tempfile.TemporaryDirectory(prefix="agl-bench-") as name, chromium(found) as browser:
                sections = visits(browser, Path(name), quick)
    return Part("The page", ABOUT, sections, busy.share_of_others())


def visits(browser: Browser, folder: Path, quick: bool) -> list[Section]:
    few, many, some_calls, many_calls = (
        folder / f"{name}.db" for name in (FEW, MANY, f"{SOME_GENERATIONS}-calls", f"{MANY_GENERATIONS}-calls")
    )
    rollouts: dict[Path, list[Rollout]] = {}
    for path, count in ((few, FEW), (many, MANY)):
        say(f"writing {count:,} rollouts to look at")
        rollouts[path] = fill(str(path), count)
    short, long = (f"/generation?id={long_generation(str(few), ids).id}" for ids in (SHORT, LONG))
    short_talk, long_talk = (conversation(str(few), calls) for calls in (FEW_CALLS, MANY_CALLS))
    prompts = long_prompts(str(few), MANY_CALLS, CHARACTERS)
    for path, calls in ((some_calls, SOME_GENERATIONS), (many_calls, MANY_GENERATIONS)):
        say(f"writing {calls:,} generations to look at")
        of_calls(path, calls)
    for path in (few, many, some_calls, many_calls):
        without_comparing(path)
    with ExitStack() as stack:
        servers = {
            path: stack.enter_context(agl_store(path, folder / f"{path.stem}.log"))
            for path in (few, many, some_calls, many_calls)
        }
        urls = {path: f"http://{HOST}:{server.port}" for path, server in servers.items()}
        for url in urls.values():
            until_it_is_counted(url)
        kinds = [
            Kind(f"{FEW:,} rollouts", False, f"{urls[few]}/rollouts", searching(rollouts[few])),
            Kind(f"{MANY:,} rollouts", True, f"{urls[many]}/rollouts", searching(rollouts[many])),
            Kind(f"{SOME_GENERATIONS:,} generations", False, f"{urls[some_calls]}/?time=all", fetching),
            Kind(f"{MANY_GENERATIONS:,} generations", True, f"{urls[many_calls]}/?time=all", fetching),
            Kind(f"{SHORT:,} tokens", False, f"{urls[few]}{short}", pressing),
            Kind(f"{LONG:,} tokens", True, f"{urls[few]}{long}", pressing),
            Kind(f"{FEW_CALLS:,} calls", False, f"{urls[few]}/rollout?id={short_talk}", unfolding),
            Kind(f"{MANY_CALLS:,} calls", True, f"{urls[few]}/rollout?id={long_talk}", unfolding),
        ]
        measured: dict[str, list[Visited]] = {kind.label: [] for kind in kinds}
        for kind in interleaved(kinds, QUICK_ROUNDS if quick else ROUNDS, "visits, timed"):
            measured[kind.label].append(visited(browser, kind))
        page = httpx.get(f"{urls[few]}/rollout", params={"id": prompts}, timeout=600)
        seconds = QUICK_SECONDS_LOOKED if quick else SECONDS_LOOKED
        live = [
            Row(kind.label, Summary.of([looked_at(browser, kind.address, servers[path].pid, seconds)]), None, LIVE)
            for kind, path in ((kinds[1], many), (kinds[3], many_calls))
        ]
    about = (
        "Of the server's processor while one page is open and nothing is written, without what the server takes while "
        "none is open."
    )
    return [
        *tables(kinds, measured),
        size_of(page),
        Section("A live page while nothing changes", "s a minute", about, live),
    ]


def of_calls(path: Path, count: int) -> None:
    """Writes rollouts with so many calls in all, of which each has the first one over again."""
    rollouts = count // CALLS_OF_A_ROLLOUT
    fill(str(path), rollouts)
    with closing(sqlite3.connect(path)) as connection, connection:
        columns = [
            row[1] for row in connection.execute("PRAGMA table_info(generations)") if row[1] not in ("key", "id")
        ]
        names = ", ".join(columns)
        [(there,)] = connection.execute("SELECT count(*) FROM generations")
        copied = ", ".join(
            "NULL" if each in ("prompt_token_ids", "prompt_text", "response_id") else each for each in columns
        )
        connection.execute(
            f"""
            WITH RECURSIVE copies (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM copies WHERE number < ?)
            INSERT INTO generations (id, {names}) SELECT randomblob(16), {copied} FROM generations, copies LIMIT ?
            """,
            (-(-count // there), count - there),
        )


def without_comparing(path: Path) -> None:
    """Let all prompts count as compared: what comparing takes is measured with drift."""
    with closing(open_database(str(path))) as database, database.writing() as connection:
        [(last,)] = connection.exec_driver_sql("SELECT max(key) FROM generations")
        drift_index.has_compared(connection, last)


def until_it_is_counted(url: str) -> None:
    """Wait until a server shows all that is in its store, which it counts when somebody looks."""
    while "being counted" in httpx.get(f"{url}/rollouts", timeout=60).text:
        time.sleep(1)


def fetching(page: Page) -> float:
    """Ask for the page again."""
    return statistics.median(page.evaluate(FETCHED) for _ in range(KEYS))


def looked_at(browser: Browser, address: str, pid: int, seconds: float) -> float:
    """Returns what a page that is open takes of the server's processor, in seconds a minute."""

    def taken() -> float:
        times = psutil.Process(pid).cpu_times()
        before = times.user + times.system
        time.sleep(seconds)
        times = psutil.Process(pid).cpu_times()
        return (times.user + times.system - before) * 60 / seconds

    alone = taken()
    visit = Visit(browser, address)
    visit.page.goto(address)
    visit.page.evaluate("new Promise((resolve) => setTimeout(resolve, 5000))")
    both = taken()
    visit.close()
    return max(both - alone, 0.0)


def size_of(page: httpx.Response) -> Section:
    """The bytes of a page of long prompts, of which each begins differently."""
    label = f"{MANY_CALLS} prompts of {CHARACTERS:,} characters"
    megabytes = Summary.of([len(page.content) / 1e6])
    return Section("The page of a rollout", "MB", rows=[Row(label, megabytes, None, Target(BYTES_LIMIT / 1e6))])


def searching(rollouts: Sequence[Rollout]) -> Callable[[Page], float]:
    """Types the id of the rollout that is the last of all."""
    return lambda page: page.evaluate(SEARCHED, rollouts[0].rollout_id)


def pressing(page: Page) -> float:
    """Goes from token to token."""
    return statistics.median(page.evaluate(PRESSED, KEYS))


def unfolding(page: Page) -> float:
    """Unfolds the first system prompt."""
    return page.evaluate(UNFOLDED)


def visited(browser: Browser, kind: Kind) -> Visited:
    visit = Visit(browser, kind.address)
    page = visit.page
    page.add_init_script(READY)
    page.goto(kind.address)
    ready = page.evaluate("isReady")
    frames = page.evaluate(SCROLLED, [FRAMES, PIXELS])
    found = Visited(page.evaluate(PAINTED), ready, kind.answered(page), frames)
    visit.close()
    return found


def tables(kinds: Sequence[Kind], measured: Mapping[str, Sequence[Visited]]) -> list[Section]:
    """Each measure, with a limit to each of those that are large."""

    def compared(of: Callable[[Visited], float], *limits: float | None) -> list[Row]:
        rows: list[Row] = []
        above: list[float] = []
        remaining = iter(limits)
        for kind in kinds:
            values = [of(each) for each in measured[kind.label]]
            limit = next(remaining) if kind.is_large else None
            target = None if limit is None else Target(limit)
            rows.append(Row.of(kind.label, values, above if kind.is_large else values, target))
            above = values
        return rows

    def counted(of: Callable[[Visited], float], limit: float | None) -> list[Row]:
        target = None if limit is None else Target(limit)
        return [
            Row(kind.label, Summary.of([of(each) for each in measured[kind.label]]), None, target) for kind in kinds
        ]

    def long_frames(visit: Visited) -> float:
        return 100 * sum(each > LONG_FRAME for each in visit.frames) / len(visit.frames)

    scrolling = f"{FRAMES} frames, in each of which it is scrolled by {PIXELS} pixels"
    return [
        Section(
            "First paint",
            "ms",
            "Until there is something to read.",
            compared(lambda each: each.painted, 1.5, 2, 2, None),
        ),
        Section("Ready", "ms", "Until every script has run.", compared(lambda each: each.ready, 1.5, 2, 5, 3)),
        Section(
            "Answer",
            "ms",
            "Of the list: from the last letter in the search until the one that it finds is shown, of which 300 ms are "
            "waited for one more letter. Of generations: until the page has come again. Of tokens: from an arrow "
            "key until the next one is. Of calls: from a click on a system prompt until it is unfolded.",
            compared(lambda each: each.answered, 1.5, None, 1.5, None),
        ),
        Section(
            "A frame",
            "ms",
            f"{scrolling}.",
            compared(lambda each: statistics.median(each.frames), 1.25, 1.25, 1.25, None),
        ),
        Section(f"Frames of more than {LONG_FRAME} ms", "%", "Of the same.", counted(long_frames, 5)),
        Section("The longest frame", "ms", "Of the same.", counted(lambda each: max(each.frames), None)),
    ]
