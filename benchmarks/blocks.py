"""The cost of prompts that begin alike: bytes on disk and on the wire, and CPU, beside prompts that are kept whole.

No vLLM runs here. Ids are drawn as a vocabulary of 150,000 has them, so that nothing can be shared by chance.
"""

from __future__ import annotations

import random
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from agentlightning.generation import Choice, Generation
from agentlightning.store import chains, open_store, prompts, wire
from benchmarks.environments import interleaved
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say
from benchmarks.store import generation, write
from tests.common.postgresql import MISSING, PostgresServer, programs

ROUNDS, QUICK_ROUNDS = 15, 4
VOCABULARY = 150_000
CALLS, LENGTH = 50, 32_000
ROLLOUTS, SYSTEM, CALLS_OF_EACH, LITTLE = 64, 8_000, 10, 256
OUTPUT = 128
SHARED, NEW = 31_000, 1_000
COPIES = 20
LETTERS_OF_AN_ID = 4
BATCH = 20
WRITTEN, PROMPT = 2_000, 512
OTHERS, QUICK_OTHERS, SHORT = 1_000_000, 100_000, 16

Calls = Sequence[Generation]


def measure(quick: bool) -> Part:
    """Everything, in files that are gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    busy, installed = BusyMeter(), programs()
    with (
        busy.running(),
        tempfile.TemporaryDirectory(prefix="agl-bench-") as name,
        PostgresServer(installed) if installed else nullcontext() as postgresql,
    ):
        folder = Path(name)
        if postgresql is None:
            say(MISSING)
        sections = [
            size(folder),
            sent(),
            writing(folder, rounds),
            throughput(folder, postgresql, rounds),
            reading(folder, rounds),
            among_others(folder, rounds, QUICK_OTHERS if quick else OTHERS),
        ]
    return Part("Prompts that begin alike", "", sections, busy.share_of_others())


def drawn(count: int, seed: int) -> array[int]:
    return array("i", random.Random(seed).choices(range(VOCABULARY), k=count))


def conversation(
    number: int, beginning: array[int], calls: int, growth: int, *, text: bool = False
) -> list[Generation]:
    """Make calls that each continue the one before, its answer included."""
    history = beginning + drawn(calls * growth, number)
    made = []
    for call in range(calls):
        end = len(beginning) + call * growth
        made.append(kept(number, history[:end], history[end : end + OUTPUT], text=text))
    return made


def kept(number: int, prompt: array[int], output: array[int], *, text: bool = False) -> Generation:
    made = generation(number * CALLS_OF_EACH, prompt, ())
    made.choices = [Choice(token_ids=output, finish_reason="stop")]
    if text:
        made.prompt_text = "".join(f"{each:<{LETTERS_OF_AN_ID}x}"[:LETTERS_OF_AN_ID] for each in prompt)
    return made


def long_rollout(number: int, *, text: bool = False) -> list[Generation]:
    growth = LENGTH // CALLS
    return conversation(number, drawn(growth, -number - 1), CALLS, growth, text=text)


def distinct(rollouts: Sequence[Calls], shared: int = 0) -> int:
    """Bytes of the distinct ids, as int32: the last prompt of each rollout and its answer have all."""
    ids = sum(len(calls[-1].prompt_token_ids or ()) + OUTPUT - shared for calls in rollouts) + shared
    return 4 * ids


def size(folder: Path) -> Section:
    """Rows of the file, without what an empty one has."""
    say("measuring files of conversations")
    rollouts = [long_rollout(number) for number in range(COPIES)]
    texts = [long_rollout(number, text=True) for number in range(COPIES)]
    system = drawn(SYSTEM, -1)
    group = [conversation(number, system, CALLS_OF_EACH, LENGTH // CALLS) for number in range(ROLLOUTS)]
    little = [conversation(number, system, CALLS_OF_EACH, LITTLE) for number in range(ROLLOUTS)]
    rows = []
    for label, found, shared, limit in (
        (f"{CALLS} calls to {LENGTH:,} ids", rollouts, 0, 1.4),
        ("the same with text", texts, 0, 2.4),
        (f"{ROLLOUTS} rollouts, {SYSTEM:,} ids shared, {CALLS_OF_EACH} calls each", group, SYSTEM, 1.4),
        (f"the same, growing by {LITTLE} ids a call", little, SYSTEM, None),
    ):
        bytes_of_ids, stored = distinct(found, shared), written(folder / f"{len(rows)}.db", found)
        ratio = Summary.of([stored / bytes_of_ids])
        rows.append(Row(label, Summary.of([stored / len(found) / 1e3]), ratio, Target(limit) if limit else None))
    about = f"kB a rollout beyond an empty file; answers of {OUTPUT} ids, which come again in the next prompt."
    return Section("Conversations on disk, to their distinct ids as int32", "kB", about, rows)


def written(path: Path, rollouts: Sequence[Calls]) -> int:
    empty = path.with_suffix(".empty")
    open_store(str(empty)).close()
    with open_store(str(path)) as store:
        for calls in rollouts:
            for each in calls:
                store.add([each])
    return path.stat().st_size - empty.stat().st_size


def sent() -> Section:
    """Row of the messages, each call in one of its own."""
    calls, recent = long_rollout(0), chains.Recent()
    total = 0
    for each in calls:
        message, blocks = wire.encode_in_blocks([each], None, recent)
        total += len(message)
        for names in blocks[each.id]:
            for name in names:
                recent.put(name, 1)
    ratio = Summary.of([total / distinct([calls])])
    row = Row(f"{CALLS} calls to {LENGTH:,} ids", Summary.of([total / 1e3]), ratio, Target(1.6))
    return Section("Conversations over HTTP, to their distinct ids as int32", "kB", "", [row])


@contextmanager
def whole_prompts() -> Iterator[None]:
    """Keep prompts whole, as without blocks."""
    with patch.object(chains, "FIRST", 1 << 40), patch.object(prompts, "FIRST", 1 << 40):
        yield


def writing(folder: Path, rounds: int) -> Section:
    """Rows of the CPU that the writing thread takes, beside the same without blocks."""
    shared = drawn(SHARED, -1)
    kinds: dict[str, tuple[Calls, Target | None]] = {
        "512 ids that share nothing": ([kept(n, drawn(512, n), drawn(OUTPUT, n)) for n in range(400)], Target(1.1)),
        "2,000 ids that share nothing": ([kept(n, drawn(2000, n), drawn(OUTPUT, n)) for n in range(200)], None),
        f"{SHARED + NEW:,} ids, {SHARED:,} of them shared": (
            [kept(n, shared + drawn(NEW, n), drawn(OUTPUT, n)) for n in range(100)],
            Target(1.0),
        ),
    }
    rows = []
    for label, (calls, target) in kinds.items():
        measured: dict[str, list[float]] = {"whole": [], "blocks": []}
        for number, way in enumerate(interleaved(list(measured), rounds, f"writing {label}, timed")):
            path = folder / f"written-{number}.db"
            if way == "whole":
                with whole_prompts():
                    measured[way].append(cpu_of_writing(path, calls))
            else:
                measured[way].append(cpu_of_writing(path, calls))
            path.unlink()
        rows.append(Row.of(label, measured["blocks"], measured["whole"], target))
    about = f"Microseconds of CPU a generation, {BATCH} a transaction; a ratio is to the same with whole prompts."
    return Section("Prompts written to SQLite", "µs", about, rows)


def cpu_of_writing(path: Path, calls: Calls) -> float:
    with open_store(str(path)) as store:
        return cpu(lambda: [store.add(calls[first : first + BATCH]) for first in range(0, len(calls), BATCH)]) / len(
            calls
        )


def cpu(work: Callable[[], object]) -> float:
    """Microseconds of CPU that this thread takes."""
    started = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - started) / 1e3


def throughput(folder: Path, postgresql: PostgresServer | None, rounds: int) -> Section:
    """Rows of the generations a second that one writer adds, beside the same with whole prompts."""
    calls = [kept(number, drawn(PROMPT, number), drawn(OUTPUT, number)) for number in range(WRITTEN)]
    rows = []
    for kind in ("SQLite", "PostgreSQL") if postgresql else ("SQLite",):
        measured: dict[str, list[float]] = {"whole": [], "blocks": []}
        for number, way in enumerate(interleaved(list(measured), rounds, f"writing to {kind}, timed")):
            path = folder / f"throughput-{number}.db"
            url = postgresql.new_database() if postgresql and kind == "PostgreSQL" else path
            with whole_prompts() if way == "whole" else nullcontext():
                measured[way].append(WRITTEN / write(url, calls))
            path.unlink(missing_ok=True)
        rows.append(Row.of(kind, measured["blocks"], measured["whole"], Target(0.95, at_least=True)))
    about = f"{WRITTEN:,} generations of {PROMPT} and {OUTPUT} ids that share nothing; a ratio is to whole prompts."
    return Section("Generations written", "a second", about, rows)


def among_others(folder: Path, rounds: int, others: int) -> Section:
    """Row of the time to read a conversation of a store with many other generations, beside whole prompts."""
    calls = [each for number in range(COPIES) for each in long_rollout(number)]
    paths = {way: folder / f"among-{way}.db" for way in ("whole", "blocks")}
    for way, path in paths.items():
        say(f"writing {others:,} other generations ({way})")
        with whole_prompts() if way == "whole" else nullcontext(), open_store(str(path)) as store:
            for first in range(COPIES, COPIES + others, 1_000):
                numbers = range(first, first + 1_000)
                store.add([generation(number * CALLS_OF_EACH, range(SHORT), range(SHORT)) for number in numbers])
            for first in range(0, len(calls), BATCH):
                store.add(calls[first : first + BATCH])
    measured: dict[str, list[float]] = {way: [] for way in paths}
    for number, way in enumerate(interleaved(list(paths), rounds, "reading one rollout of many, timed")):
        with open_store(str(paths[way])) as store:
            rollout = calls[number % COPIES * CALLS].rollout_id
            started = time.perf_counter()
            found = sum(len(each.prompt_token_ids or ()) for each in store.generations(rollout_id=rollout))
            measured[way].append((time.perf_counter() - started) * 1e3)
            assert found == sum(len(each.prompt_token_ids or ()) for each in calls[:CALLS])
    label = f"{CALLS} calls to {LENGTH:,} ids, among {others:,} generations"
    row = Row.of(label, measured["blocks"], measured["whole"], Target(1.2))
    return Section("One rollout read from a large store", "ms", "A ratio is to the same with whole prompts.", [row])


def reading(folder: Path, rounds: int) -> Section:
    """Row of reading a conversation with all its ids."""
    calls = long_rollout(0)
    paths = {"whole": folder / "read-whole.db", "blocks": folder / "read-blocks.db"}
    with whole_prompts():
        cpu_of_writing(paths["whole"], calls)
    cpu_of_writing(paths["blocks"], calls)
    measured: dict[str, list[float]] = {way: [] for way in paths}
    for way in interleaved(list(paths), rounds, "reading a conversation, timed"):
        with open_store(str(paths[way])) as store:
            started = time.perf_counter()
            found = [len(each.prompt_token_ids or ()) for each in store.generations()]
            measured[way].append(1 / (time.perf_counter() - started))
            assert len(found) == CALLS
            assert found[-1] == len(calls[-1].prompt_token_ids or ())
    row = Row.of(f"{CALLS} calls to {LENGTH:,} ids", measured["blocks"], measured["whole"], Target(0.8, at_least=True))
    return Section("Conversations read from SQLite", "a second", "A ratio is to the same with whole prompts.", [row])
