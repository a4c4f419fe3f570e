"""Stores beyond one machine: generations into PostgreSQL and over HTTP, triplets out of `agl store`, and that store
on PostgreSQL.

Every server runs here all the same, and shares the machine with who asks it: what a network costs is not in here.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import orjson
import psutil
import psycopg
import uvloop

from agentlightning.recorder import BATCH_GENERATIONS
from agentlightning.server.routes.triplets import items
from agentlightning.store import open_database, open_store, triplets
from agentlightning.store.database import Database
from agentlightning.store.postgresql import SCHEMA
from benchmarks import lightning_store
from benchmarks.environments import interleaved
from benchmarks.lightning_store import ADDED, STARTED, VOCABULARY, agl_store
from benchmarks.load import HOST, UnexpectedAnswer, get, send
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.store import OUTPUT, PROMPT, QUICK_ROUNDS, ROUNDS, WRITTEN, generation, some, write
from tests.common.postgresql import MISSING, PostgresServer, programs

CALLS = 50
LONG_PROMPT, LONG_OUTPUT = 7_168, 1_024
READS = 8
ROLLOUT = "rollout"
HALF, MOST = Target(0.5, at_least=True), Target(0.7, at_least=True)

ABOUT = "Every server is on the machine of who asks it."


def measure(quick: bool) -> Part:
    """Everything, in files and databases that are gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    sizes = lightning_store.QUICK if quick else lightning_store.FULL
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    installed = programs()
    with (
        PostgresServer(installed) if installed else nullcontext() as postgresql,
        busy.running(),
        tempfile.TemporaryDirectory(prefix="agl-bench-") as name,
    ):
        folder = Path(name)
        sections = [writing_over_http(folder, rounds), reading_triplets(folder, rounds)]
        if postgresql:
            sections.insert(0, writing_to_postgresql(postgresql.new_database(), rounds))
            sections += uvloop.run(serving(folder, postgresql.new_database(), sizes))
        else:
            say(MISSING)
            sections.append(Section("PostgreSQL", skipped=f"Neither written to nor served on: {MISSING}"))
    return Part("Beyond one machine", ABOUT, sections, busy.share_of_others())


@dataclass(frozen=True)
class Table:
    """The rows of a store's table, and how PostgreSQL takes them.

    Attributes:
        types: of the columns, by PostgreSQL's numbers.
    """

    copy: bytes
    types: Sequence[int]
    rows: Sequence[tuple[Any, ...]]


def writing_to_postgresql(url: str, rounds: int) -> Section:
    """The store, to what writes the same rows in the fastest way that there is, and knows nothing of generations."""
    generations = some(WRITTEN)
    write(url, generations)
    tables = contents(url)
    ways: dict[str, Callable[[], float]] = {
        "COPY of the same rows, in binary": lambda: copy(url, tables),
        "open_store(...).add": lambda: write(url, generations),
    }
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for way in interleaved(list(ways), rounds, "writing to PostgreSQL, timed"):
        empty(url)
        measured[way].append(WRITTEN / ways[way]())
    about = (
        f"{WRITTEN:,} generations of {PROMPT} and {OUTPUT} ids, {BATCH_GENERATIONS} a transaction, into empty tables "
        "with all their indexes."
    )
    return Section("Generations written to PostgreSQL", "a second", about, beside_the_first(measured))


def copy(url: str, tables: Sequence[Table]) -> float:
    """Seconds, for the same rows in the same transactions, tables and indexes."""
    with psycopg.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
        started = time.perf_counter()
        for first in range(0, WRITTEN, BATCH_GENERATIONS):
            with connection.transaction():
                for table in tables:
                    with cursor.copy(table.copy) as copying:
                        copying.set_types(table.types)
                        for row in table.rows[first : first + BATCH_GENERATIONS]:
                            copying.write_row(row)
        return time.perf_counter() - started


def contents(url: str) -> list[Table]:
    """Return the rows that a store has of generations."""
    tables = []
    with psycopg.connect(url) as connection:
        for name in ("texts", "generations", "choices"):
            found = connection.execute(f"SELECT * FROM {SCHEMA}.{name}".encode())
            types = [column.type_code for column in found.description or ()]
            tables.append(Table(f"COPY {SCHEMA}.{name} FROM STDIN (FORMAT BINARY)".encode(), types, found.fetchall()))
    return tables


def empty(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(f"TRUNCATE {SCHEMA}.texts, {SCHEMA}.generations, {SCHEMA}.choices".encode())


def writing_over_http(folder: Path, rounds: int) -> Section:
    """Measure writing by way of an `agl store`, beside straight into its file."""
    generations = some(WRITTEN)

    def over_http(path: Path) -> float:
        with agl_store(path, path.with_suffix(".log")) as server:
            return write(f"http://{HOST}:{server.port}", generations)

    ways: dict[str, Callable[[Path], float]] = {
        "straight into the file": lambda path: write(path, generations),
        "over HTTP, by way of agl store": over_http,
    }
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for number, way in enumerate(interleaved(list(ways), rounds, "writing over HTTP, timed")):
        path = folder / f"written-{number}.db"
        measured[way].append(WRITTEN / ways[way](path))
        path.unlink()
    about = (
        f"{WRITTEN:,} generations of {PROMPT} and {OUTPUT} ids with open_store(...).add, {BATCH_GENERATIONS} at a "
        "time, one after the other, into a new SQLite file."
    )
    return Section("Generations written over HTTP", "a second", about, beside_the_first(measured))


def reading_triplets(folder: Path, rounds: int) -> Section:
    """A rollout of long calls, to no more than what has to be read and written of it."""
    path = folder / "calls.db"
    fill(path)
    with (
        closing(open_database(str(path))) as database,
        closing(sqlite3.connect(path)) as connection,
        agl_store(path, folder / "calls.log") as server,
    ):
        request = get(f"/v1/agl/rollouts/{ROLLOUT}/triplets")
        ways: dict[str, Callable[[], tuple[float, bytes]]] = {
            "sqlite3 and orjson, the ids alone": lambda: timed(lambda: ids_as_json(connection)),
            "agl store, over HTTP": lambda: asked(server.port, request),
            "triplets.of_rollout, in process": lambda: timed(lambda: triplets_as_json(database)),
        }
        expected = msgspec.json.decode(ids_as_json(connection))
        measured: dict[str, list[float]] = {way: [] for way in ways}
        for way in interleaved(list(ways), rounds, "reading triplets, timed"):
            seconds, answer = ways[way]()
            measured[way].append(READS * CALLS / seconds)
            if ids_of(answer) != expected:
                raise UnexpectedAnswer(f"{way}: not the ids that were written")
    about = (
        f"A rollout of {CALLS} calls with {LONG_PROMPT:,} and {LONG_OUTPUT:,} ids each as JSON, {READS} times one "
        "after the other, from a SQLite file."
    )
    return Section("Triplets read", "a second", about, beside_the_first(measured))


def fill(path: Path) -> None:
    """A store of one rollout."""
    draw = random.Random(0)
    of_rollout = {"rollout_id": ROLLOUT, "attempt_id": "attempt"}
    with open_store(str(path)) as store:
        for number in range(CALLS):
            prompt, output = ([draw.randrange(VOCABULARY) for _ in range(n)] for n in (LONG_PROMPT, LONG_OUTPUT))
            store.add([replace(generation(number, prompt, output), **of_rollout)])


def ids_as_json(connection: sqlite3.Connection) -> bytes:
    """Return the ids of each call: those of its prompt and those of its answer."""
    query = """
        SELECT prompt_token_ids, token_ids FROM generations JOIN choices ON generation_key = generations.key
        WHERE rollout_key = (SELECT key FROM texts WHERE text = ?) ORDER BY finished_at
    """
    rows = connection.execute(query, (ROLLOUT,))
    return orjson.dumps([[array("i", blob).tolist() for blob in row] for row in rows])


def triplets_as_json(database: Database) -> bytes:
    with database.reading() as connection:
        return items(triplets.of_rollout(connection, ROLLOUT))


def timed(read: Callable[[], bytes]) -> tuple[float, bytes]:
    """Seconds of all reads, and what the last one found."""
    started = time.perf_counter()
    for _ in range(READS - 1):
        read()
    answer = read()
    return time.perf_counter() - started, answer


def asked(port: int, request: bytes) -> tuple[float, bytes]:
    """Seconds of all reads, and what the last one was answered."""
    load = uvloop.run(send(port, [request] * READS, 1))
    return load.seconds, load.answers[-1]


def ids_of(answer: bytes) -> Any:
    """Read the ids again from what `ids_as_json` has of them."""
    found = msgspec.json.decode(answer)
    if isinstance(found, list):
        return found
    return [[each["prompt_token_ids"], each["response_token_ids"]] for each in found["items"]]


async def serving(folder: Path, url: str, sizes: lightning_store.Sizes) -> list[Section]:
    """Measure `agl store` beside Agent Lightning's store, on both databases."""
    with (
        agl_store(folder / "served.db", folder / "sqlite.log") as sqlite,
        agl_store(url, folder / "postgresql.log", "agl store, PostgreSQL on a disk") as postgresql,
    ):
        both = (sqlite, postgresql)
        sections = [
            *await lightning_store.rates(both, sizes, {STARTED: MOST, ADDED: MOST}),
            await lightning_store.dequeued(both, sizes, Target(1.5)),
        ]
        return [replace(section, title=f"agl store on PostgreSQL: {section.title}") for section in sections]


def beside_the_first(measured: dict[str, list[float]]) -> list[Row]:
    """A row for each way, with its ratio to the first; the second has a target."""
    first, second, *_ = measured
    return [Row.of(way, values, measured[first], HALF if way == second else None) for way, values in measured.items()]
