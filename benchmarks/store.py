"""The cost of recording beside the server: the queue on the caller's side, SQLite on the other, and the disk.

No server runs here. Needs some 2 GB of disk for a while, in the folder for temporary files.
"""

from __future__ import annotations

import os
import random
import sqlite3
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from agentlightning.generation import Choice, Generation, new_id
from agentlightning.recorder import BATCH_GENERATIONS, Recorder
from agentlightning.store import Store, open_store
from benchmarks.environments import interleaved
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say

ROUNDS = 30
QUICK_ROUNDS = 6
WRITTEN = 5_000
CALLS_OF_A_ROLLOUT = 10
ROLLOUTS_A_ROUND = 20
FEW, MANY, QUICK_MANY = 1_000, 1_000_000, 100_000
RECORDED = 100
PROMPTS = (1_000, 8_000, 32_000)
PROMPT, OUTPUT = 512, 128
MICROSECONDS = 20

Table = tuple[str, list[tuple[object, ...]]]


def measure(quick: bool) -> Part:
    """Everything, in files that are gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    busy = BusyMeter()
    with busy.running(), tempfile.TemporaryDirectory(prefix="agl-bench-") as name:
        folder = Path(name)
        sections = [
            recording(folder, rounds),
            writing(folder, rounds),
            reading(folder, rounds, QUICK_MANY if quick else MANY),
            size(folder),
        ]
    return Part("The store", "", sections, busy.share_of_others())


def recording(folder: Path, rounds: int) -> Section:
    """Row 1: what one generation costs the thread that serves, however long its prompt."""
    recorder = Recorder(str(folder / "recorded.db"), 1 << 34)
    recorder.start()
    prompts = {length: list(range(length)) for length in PROMPTS}
    measured: dict[int, list[float]] = {length: [] for length in PROMPTS}
    for length in interleaved(PROMPTS, rounds, "Recorder.record, timed"):
        measured[length].append(statistics.median(islice(timed_records(recorder, prompts[length]), RECORDED)))
        wait_for(lambda: recorder.counters().queue_bytes == 0)
    recorder.close()
    rows = [
        Row.of(f"a prompt of {length:,} ids", measured[length], [MICROSECONDS] * rounds, Target(1))
        for length in PROMPTS
    ]
    rows.append(Row.of("the longest, to the shortest", measured[PROMPTS[-1]], measured[PROMPTS[0]], Target(1.25)))
    about = f"On the thread that calls, the median of {RECORDED} at a time. A ratio is to {MICROSECONDS} µs."
    return Section("Recorder.record", "µs", about, rows)


def timed_records(recorder: Recorder, prompt: list[int]) -> Iterator[float]:
    """Microseconds of each call."""
    output = list(range(OUTPUT))
    while True:
        started = time.perf_counter_ns()
        recorder.record(lambda: generation(0, prompt, output), 4 * (len(prompt) + len(output)))
        yield (time.perf_counter_ns() - started) / 1e3


def writing(folder: Path, rounds: int) -> Section:
    """Row 2: the store, to what writes the same rows and knows nothing of generations."""
    generations = some(WRITTEN)
    with open_store(str(folder / "rows.db")) as store:
        store.add(generations)
    schema, tables = contents(folder / "rows.db")
    ways: dict[str, Callable[[Path], float]] = {
        "sqlite3.executemany": lambda path: write_raw(path, schema, tables),
        "open_store(...).add": lambda path: write(path, generations),
    }
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for number, way in enumerate(interleaved(list(ways), rounds, "writing, timed")):
        path = folder / f"written-{number}.db"
        measured[way].append(WRITTEN / ways[way](path))
        path.unlink()
    raw, ours = measured.values()
    rows = [
        Row.of("sqlite3.executemany of the same rows", raw, raw),
        Row.of("open_store(...).add", ours, raw, Target(0.6, at_least=True)),
    ]
    about = f"{WRITTEN:,} generations of {PROMPT} and {OUTPUT} ids, {BATCH_GENERATIONS} a transaction, into a new file."
    return Section("Generations written to SQLite", "a second", about, rows)


def write(url: Path | str, generations: Sequence[Generation]) -> float:
    """Seconds."""
    with open_store(str(url)) as store:
        started = time.perf_counter()
        for first in range(0, len(generations), BATCH_GENERATIONS):
            store.add(generations[first : first + BATCH_GENERATIONS])
        return time.perf_counter() - started


def write_raw(path: Path, schema: Sequence[str], tables: Sequence[Table]) -> float:
    """Seconds, for the same rows in the same transactions, tables, indexes and settings of SQLite."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for setting in ("page_size = 16384", "journal_mode = WAL", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {setting}")
        for statement in schema:
            connection.execute(statement)
        started = time.perf_counter()
        for first in range(0, WRITTEN, BATCH_GENERATIONS):
            connection.execute("BEGIN IMMEDIATE")
            for insert, rows in tables:
                connection.executemany(insert, rows[first : first + BATCH_GENERATIONS])
            connection.execute("COMMIT")
        return time.perf_counter() - started


def contents(path: Path) -> tuple[list[str], list[Table]]:
    """Return what makes the tables and indexes of a store, and for each table what fills it, and with which rows."""
    with closing(sqlite3.connect(path)) as connection:
        schema = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
        tables = []
        for name in ("texts", "generations", "choices"):
            rows = connection.execute(f"SELECT * FROM {name}").fetchall()
            tables.append((f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows))
        return schema, tables


def reading(folder: Path, rounds: int, many: int) -> Section:
    """Row 3: one rollout, in a small file and in a large one."""
    stores: dict[int, Store] = {}
    for count in (FEW, many):
        say(f"writing {count:,} generations to read from")
        stores[count] = open_store(str(folder / f"{count}.db"))
        for first in range(0, count, BATCH_GENERATIONS):
            stores[count].add(some(BATCH_GENERATIONS, first, prompt=8, output=4))
    measured: dict[int, list[float]] = {count: [] for count in stores}
    which = random.Random(0)
    for count in interleaved(list(stores), rounds, "reading, timed"):
        started = time.perf_counter()
        for _ in range(ROLLOUTS_A_ROUND):
            found = list(stores[count].generations(rollout_id=rollout(which.randrange(count))))
            assert len(found) == CALLS_OF_A_ROLLOUT
        measured[count].append((time.perf_counter() - started) / ROLLOUTS_A_ROUND * 1e3)
    for store in stores.values():
        store.close()
    rows = [
        Row.of(f"among {FEW:,} generations", measured[FEW], measured[FEW]),
        Row.of(f"among {many:,}", measured[many], measured[FEW], Target(2)),
    ]
    about = f"{CALLS_OF_A_ROLLOUT} generations to a rollout; {ROLLOUTS_A_ROUND} rollouts at a time, drawn anew."
    return Section("Reading one rollout", "ms", about, rows)


def size(folder: Path) -> Section:
    """Row 4: the file, to the ids in it."""
    say("measuring files")
    lengths = random.Random(0)
    drawn = [
        generation(number, range(lengths.randrange(2 * PROMPT)), range(lengths.randrange(2 * OUTPUT)))
        for number in range(WRITTEN)
    ]
    files = {f"{PROMPT} and {OUTPUT} ids each": some(WRITTEN), "lengths drawn from 0 to twice as many": drawn}
    rows = [Row("its ids, as int32", Summary.of([4.0 * (PROMPT + OUTPUT)]), Summary.of([1.0]))]
    for label, generations in files.items():
        path = folder / f"size-{len(rows)}.db"
        write(path, generations)
        ids = 4 * sum(len(each.prompt_token_ids or ()) + len(each.choices[0].token_ids or ()) for each in generations)
        target = Target(1.3) if len(rows) == 1 else None
        bytes_each = path.stat().st_size / WRITTEN
        rows.append(Row(label, Summary.of([bytes_each]), Summary.of([path.stat().st_size / ids]), target))
    about = (
        f"The file with all its indexes, {WRITTEN:,} generations without text. A ratio is to the ids in it, as int32."
    )
    return Section("A generation on disk", "bytes", about, rows)


def some(count: int, first: int = 0, prompt: int = PROMPT, output: int = OUTPUT) -> list[Generation]:
    return [generation(number, range(prompt), range(output)) for number in range(first, first + count)]


def generation(number: int, prompt: Sequence[int], output: Sequence[int]) -> Generation:
    """Make a generation as a chat request leaves one, without text."""
    now = time.time_ns()
    response_id = f"chatcmpl-{os.urandom(16).hex()}"
    return Generation(
        call_id=new_id(now),
        request_id=f"{response_id}-{os.urandom(4).hex()}",
        response_id=response_id,
        endpoint="/v1/chat/completions",
        model="Qwen/Qwen3-0.6B",
        rollout_id=rollout(number),
        attempt_id=f"attempt of {rollout(number)}",
        started_at=now - 1_000_000_000,
        first_token_at=now - 900_000_000,
        finished_at=now,
        status="finished",
        prompt_token_ids=array("i", prompt),
        sampling_params='{"temperature": 1.0, "top_p": 1.0, "max_tokens": 128}',
        cached_tokens=0,
        choices=[Choice(token_ids=array("i", output), finish_reason="length")],
    )


def rollout(number: int) -> str:
    return f"rollout-{number // CALLS_OF_A_ROLLOUT:032x}"


def wait_for(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)
