"""The cost of deleting: writers beside `agl prune`, and what each write pays so that space can be returned."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from sqlalchemy import Connection

from agentlightning.recorder import BATCH_GENERATIONS
from agentlightning.store import open_store
from agentlightning.store.postgresql import START, PostgresqlDatabase
from benchmarks.environments import interleaved
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say
from benchmarks.store import WRITTEN, generation, some, write
from tests.common.postgresql import MISSING, PostgresServer, programs

ROUNDS, QUICK_ROUNDS = 12, 4
KEPT, DELETED, QUICK = 5_000, 50_000, 5_000
"""Generations."""
IDS = 2_000
WRITES, SECONDS_BETWEEN = 8, 0.02
BASELINE_SECONDS = 10
LONGEST = Target(1.0)

ABOUT = f"A store of {IDS:,} ids a generation that no other shares; a PostgreSQL server is on the same machine."


def measure(quick: bool) -> Part:
    """Everything, in files and databases that are gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    deleted = QUICK if quick else DELETED
    busy = BusyMeter()
    installed = programs()
    with (
        PostgresServer(installed) if installed else nullcontext() as postgresql,
        busy.running(),
        tempfile.TemporaryDirectory(prefix="agl-bench-") as name,
    ):
        folder = Path(name)
        sections = [in_sqlite(folder, rounds), beside_prune("SQLite", str(folder / "pruned.db"), deleted)]
        if postgresql is None:
            sections.append(Section("PostgreSQL", skipped=MISSING))
        else:
            sections.append(in_postgresql(postgresql, rounds))
            sections.append(beside_prune("PostgreSQL", postgresql.new_database(), deleted))
    return Part("Deleting", ABOUT, sections, busy.share_of_others())


def in_sqlite(folder: Path, rounds: int) -> Section:
    """Measure writing a file that can become smaller."""

    def keeping(path: Path) -> float:
        with closing(sqlite3.connect(path)) as connection:
            # The first page decides.
            connection.execute("PRAGMA page_size = 16384")
            connection.execute("PRAGMA auto_vacuum = NONE")
            connection.execute("CREATE TABLE first (page)")
            connection.execute("DROP TABLE first")
        return write(path, generations)

    def shrinking(path: Path) -> float:
        return write(path, generations)

    generations = some(WRITTEN)
    ways: dict[str, Callable[[Path], float]] = {
        "a file that keeps its size": keeping,
        "one that can shrink (auto_vacuum)": shrinking,
    }
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for number, way in enumerate(interleaved(list(ways), rounds, "writing to SQLite, timed")):
        path = folder / f"written-{number}.db"
        measured[way].append(WRITTEN / ways[way](path))
        path.unlink()
    return compared("Generations written to SQLite that can shrink", measured)


def in_postgresql(server: PostgresServer, rounds: int) -> Section:
    """Measure the lock that each write transaction takes."""

    def plain(self: PostgresqlDatabase, *, alone: bool = False) -> AbstractContextManager[Connection]:
        return self._transaction("BEGIN ISOLATION LEVEL READ COMMITTED", START)

    generations = some(WRITTEN)
    ways = {
        "without a lock": lambda: mock.patch.object(PostgresqlDatabase, "writing", plain),
        "with the lock of writers": nullcontext,
    }
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for way in interleaved(list(ways), rounds, "writing to PostgreSQL, timed"):
        with ways[way]():
            measured[way].append(WRITTEN / write(server.new_database(), generations))
    return compared("Generations written to PostgreSQL with the lock", measured)


def compared(title: str, measured: dict[str, list[float]]) -> Section:
    (first, before), (second, after) = measured.items()
    rows = [Row.of(first, before, before), Row.of(second, after, before, Target(0.95, at_least=True))]
    return Section(title, "a second", f"{WRITTEN:,} generations, {BATCH_GENERATIONS} a transaction.", rows)


def beside_prune(kind: str, url: str, count: int) -> Section:
    """The time that writers wait while most of a store is deleted, and the space that comes back."""
    say(f"filling {kind} with {count + KEPT:,} generations")
    with open_store(url) as store:
        for first in range(0, count + KEPT, BATCH_GENERATIONS):
            # Prompts that begin differently share nothing.
            new = [generation(n, range(n, n + IDS), range(128)) for n in range(first, first + BATCH_GENERATIONS)]
            for place, each in enumerate(new):
                is_kept = first + place >= count
                each.rollout_id = f"kept-{(first + place) // 10}" if is_kept else f"old-{(first + place) // 10}"
                each.finished_at = time.time_ns() if is_kept else each.finished_at - 10 * 86_400 * 10**9
            store.add(new)
    ends = time.monotonic() + BASELINE_SECONDS
    alone = [*waits(url, lambda: time.monotonic() < ends)]
    arguments = [sys.executable, "-m", "agentlightning", "prune", "--store", url, "--older-than", "7d", "--json"]
    dry = json.loads(subprocess.run([*arguments, "--dry-run"], check=True, stdout=subprocess.PIPE).stdout)
    with running(arguments) as process:
        started = time.monotonic()
        beside = [*waits(url, lambda: process.poll() is None)]
        took = time.monotonic() - started
        output, _ = process.communicate()
    found = json.loads(output)
    megabytes = 1e6
    returned = (found["size_before"] - found["size_after"]) / megabytes
    rows = [
        Row("longest write, seconds", Summary.of([max(alone)])),
        Row("longest write beside agl prune, seconds", Summary.of([max(beside)]), None, LONGEST),
        Row("a write, milliseconds", Summary.of([1e3 * each for each in alone])),
        Row("a write beside agl prune, milliseconds", Summary.of([1e3 * each for each in beside])),
        Row("agl prune, seconds", Summary.of([took])),
        Row("generations deleted", Summary.of([float(found["generations"])])),
        Row("MB that --dry-run announces", Summary.of([dry["bytes"] / megabytes])),
        Row("MB before", Summary.of([found["size_before"] / megabytes])),
        Row("MB that the database became smaller by, what was written beside it included", Summary.of([returned])),
    ]
    about = (
        f"Transactions of {WRITES} generations, one every {SECONDS_BETWEEN} s, while `agl prune` deletes the others."
    )
    return Section(f"Writers beside agl prune, {kind}", "measured", about, rows)


@contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """End the process with the block, if it has not ended."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def waits(url: str, goes_on: Callable[[], bool]) -> Iterator[float]:
    """Write as a server does, and measure the seconds of each write."""
    with open_store(url, patience=60) as store:
        while goes_on():
            new = some(WRITES, prompt=512)
            started = time.perf_counter()
            store.add(new)
            yield time.perf_counter() - started
            time.sleep(SECONDS_BETWEEN)
