"""Limits of a store: calls that it takes a second and the bytes of each, and what so many GPUs need of both.

A full run writes `docs/scale.md`, too. Everything runs on one machine: who writes, who serves and the database share
its cores, so that a store on a machine of its own takes more.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from agentlightning.generation import Choice, Generation
from agentlightning.recorder import BATCH_GENERATIONS
from agentlightning.store import chains, open_database, open_store, wire
from benchmarks.blocks import drawn
from benchmarks.environments import CHECKOUT, interleaved
from benchmarks.lightning_store import agl_store
from benchmarks.load import HOST
from benchmarks.machine import BusyMeter, describe_machine
from benchmarks.report import Part, Row, Section, Summary, Target, say
from benchmarks.store import generation
from tests.common.postgresql import MISSING, PostgresServer, programs

PAGE = CHECKOUT / "docs" / "scale.md"
GPUS = (8, 64, 1_024)
TOKENS = 5_000
"""Tokens that a GPU generates a second."""
SYSTEM, ANSWER, TURN, CALLS = 1_024, 512, 128, 8
"""Ids of the system prompt, of an answer and of what the agent adds after it; calls of a rollout."""
WRITERS, REPLICAS = 4, 3
CORES_FOR_REPLICAS = 8
HOUR = 3_600
HEADROOM = 2
"""A store is used up to this part of what it takes: it is read, too, and traffic is uneven."""

FILE = "a SQLite file, one vLLM server"
SERVED = "one `agl store` on a file"
DATABASE = "one PostgreSQL, written directly"
ONE = "one `agl store` on PostgreSQL"
SEVERAL = f"{REPLICAS} of `agl store` on one PostgreSQL"


@dataclass(frozen=True)
class Place:
    """Place where generations are written.

    Attributes:
        urls: of the stores; each is written by as many writers.
        writers: processes that write at the same time.
    """

    urls: Sequence[str]
    writers: int


@dataclass(frozen=True)
class Measured:
    """Result of a measurement.

    Attributes:
        rates: calls a second, by place, of each round.
        sizes: bytes of a call, by what they are.
    """

    rates: Mapping[str, Sequence[float]]
    sizes: Mapping[str, float]


def measure(quick: bool) -> Part:
    """Everything, in files and databases that are gone afterwards."""
    rounds, rollouts = (1, 16) if quick else (5, 64)
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with busy.running(), tempfile.TemporaryDirectory(prefix="agl-bench-") as name, ExitStack() as running:
        places = started(Path(name), running)
        numbers = count()
        rates: dict[str, list[float]] = {label: [] for label in places}
        for label in interleaved(list(places), rounds, "calls recorded"):
            rates[label].append(rate(places[label], rollouts, numbers))
        found = Measured(rates, sizes(Path(name), places))
    part = Part("How far a store goes", ABOUT, sections(found), busy.share_of_others())
    if not quick:
        PAGE.write_text(page(found, part))
    return part


ABOUT = (
    f"Rollouts of {CALLS} calls: a system prompt of {SYSTEM:,} ids that all share, answers of {ANSWER} ids, and {TURN} "
    f"ids between them; without text, up to {BATCH_GENERATIONS} calls at once. All processes share the machine."
)


def started(folder: Path, running: ExitStack) -> dict[str, Place]:
    """Start the stores."""

    def served(store: Path | str, number: int) -> str:
        server = running.enter_context(agl_store(store, folder / f"{number}.log"))
        return f"http://{HOST}:{server.port}"

    places = {
        FILE: Place([str(folder / "file.db")], 1),
        SERVED: Place([served(folder / "served.db", 0)], WRITERS),
    }
    if (installed := programs()) is None:
        say(MISSING)
        return places
    postgresql = running.enter_context(PostgresServer(installed))
    direct, one, several = (postgresql.new_database() for _ in range(3))
    return {
        **places,
        DATABASE: Place([direct], WRITERS),
        ONE: Place([served(one, 1)], WRITERS),
        SEVERAL: Place([served(several, 2 + number) for number in range(REPLICAS)], WRITERS),
    }


def rate(place: Place, rollouts: int, numbers: Iterator[int]) -> float:
    """Calls a second, from the start of the first writer to the end of the last."""
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(place.writers), context.Queue()
    writers = [
        context.Process(target=write, args=(place.urls[n % len(place.urls)], next(numbers), rollouts, barrier, told))
        for n in range(place.writers)
    ]
    for each in writers:
        each.start()
    times = [told.get() for _ in writers]
    for each in writers:
        each.join()
    return place.writers * rollouts * CALLS / (max(end for _, end in times) - min(begin for begin, _ in times))


def write(url: str, number: int, rollouts: int, barrier: Any, told: Any) -> None:
    """Write the calls of rollouts as a server records them: those of many rollouts in turns."""
    calls = in_turns(number, rollouts)
    with open_store(url) as store:
        barrier.wait()
        begin = time.time()
        for first in range(0, len(calls), BATCH_GENERATIONS):
            store.add(calls[first : first + BATCH_GENERATIONS])
        told.put((begin, time.time()))


def in_turns(number: int, rollouts: int) -> list[Generation]:
    """Make the calls of rollouts, first the first of each."""
    system = drawn(SYSTEM, -1)
    made = [[*conversation(f"{number}-{each}", system, number * rollouts + each)] for each in range(rollouts)]
    return [calls[turn] for turn in range(CALLS) for calls in made]


def conversation(rollout_id: str, system: array[int], seed: int) -> Iterator[Generation]:
    history = system + drawn(CALLS * (ANSWER + TURN), seed)
    for turn in range(CALLS):
        end = SYSTEM + TURN + turn * (ANSWER + TURN)
        made = generation(0, history[:end], ())
        made.rollout_id, made.attempt_id = rollout_id, f"attempt of {rollout_id}"
        made.choices = [Choice(token_ids=history[end : end + ANSWER], finish_reason="stop")]
        yield made


def sizes(folder: Path, places: Mapping[str, Place]) -> dict[str, float]:
    """Bytes of a call on the wire, in a file, and in PostgreSQL if it is there."""
    found = {"sent to `agl store`": sent(), "in a SQLite file": stored(str(folder / "size.db"))}
    if DATABASE in places:
        [url] = places[DATABASE].urls
        with closing(open_database(url)) as database, open_store(url, read_only=True) as store:
            calls = sum(store.tally().values())
            found["in PostgreSQL"] = database.size() / calls
    return found


def sent() -> float:
    recent, total, calls = chains.Recent(), 0, in_turns(-1, BATCH_GENERATIONS)
    for first in range(0, len(calls), BATCH_GENERATIONS):
        message, blocks = wire.encode_in_blocks(calls[first : first + BATCH_GENERATIONS], None, recent)
        total += len(message)
        for of_call in blocks.values():
            for names in of_call:
                for name in names:
                    recent.put(name, 1)
    return total / len(calls)


def stored(path: str) -> float:
    calls = in_turns(-1, 64)
    with open_store(path) as store:
        for first in range(0, len(calls), BATCH_GENERATIONS):
            store.add(calls[first : first + BATCH_GENERATIONS])
    with closing(open_database(path)) as database:
        return database.size() / len(calls)


def sections(found: Measured) -> list[Section]:
    rates = found.rates
    rows = [Row.of(label, values, rates[FILE]) for label, values in rates.items()]
    tables = [Section("Calls recorded", "a second", "A ratio is to the first line.", rows)]
    if SEVERAL in rates:
        enough = (os.cpu_count() or 1) >= CORES_FOR_REPLICAS
        target = Target(1.5, at_least=True) if enough else None
        about = "The same writers. " + (
            "" if enough else f"The target of 1.5 is for {CORES_FOR_REPLICAS} cores or more: here they share too few."
        )
        replicas = [Row.of(ONE, rates[ONE], rates[ONE]), Row.of(SEVERAL, rates[SEVERAL], rates[ONE], target)]
        tables.append(Section("Replicas", "a second", about.strip(), replicas))
    of_calls = [Row(label, Summary.of([size])) for label, size in found.sizes.items()]
    tables.append(Section("A call", "bytes", "With all indexes.", of_calls))
    return tables


def needed(gpus: int) -> float:
    """Calls a second of so many GPUs."""
    return gpus * TOKENS / ANSWER


def page(found: Measured, part: Part) -> str:
    """Write the page on how far a store goes."""
    rates = {label: statistics.median(values) for label, values in found.rates.items()}
    machine = "; ".join(f"{name}: {value}" for name, value in describe_machine().items())
    header = ["", *(f"{gpus:,} GPUs" for gpus in GPUS)]
    prompt = statistics.mean(SYSTEM + TURN + turn * (ANSWER + TURN) for turn in range(CALLS))
    needs = [
        header,
        ["calls a second", *(f"{needed(gpus):,.0f}" for gpus in GPUS)],
        ["ids generated a second", *(f"{gpus * TOKENS:,}" for gpus in GPUS)],
        ["ids of prompts a second", *(f"{needed(gpus) * prompt:,.0f}" for gpus in GPUS)],
        *(
            [f"GB an hour, {label}", *(f"{needed(gpus) * size * HOUR / 1e9:,.1f}" for gpus in GPUS)]
            for label, size in found.sizes.items()
        ),
    ]
    ends = [
        ["", "calls a second", "ends at", *(f"of it, {gpus:,} GPUs" for gpus in GPUS)],
        *(
            [
                label,
                f"{value:,.0f}",
                f"{value * ANSWER / TOKENS:,.0f} GPUs",
                *(used(needed(gpus) / value) for gpus in GPUS),
            ]
            for label, value in rates.items()
        ),
    ]
    advice = [f"- **{gpus:,} GPUs**: {advised(gpus, rates)}." for gpus in GPUS]
    return TEMPLATE.format(
        tokens=TOKENS,
        about="\n  ".join(part.paragraph),
        machine=machine,
        needs=in_markdown(needs),
        ends=in_markdown(ends),
        advice="\n".join(advice),
        headroom=HEADROOM,
    )


def used(share: float) -> str:
    return f"{share:.0%}" if share <= 1 else f"{share:,.1f} times"


def advised(gpus: int, rates: Mapping[str, float]) -> str:
    """Say what is enough for so many GPUs, with room for readers."""
    need = needed(gpus) * HEADROOM
    for label in (SERVED, DATABASE):
        if rates.get(label, 0.0) >= need:
            return f"{label} is enough"
    label = DATABASE if DATABASE in rates else SERVED
    databases = math.ceil(need / rates[label])
    return f"{databases} databases on machines like this one, each for a share of the vLLM servers and their runners"


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *others = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([header, "|---|" + "---:|" * (len(lines[0]) - 1), *others])


TEMPLATE = """# Scale

How many GPUs a store can follow, where each kind of store ends, and what to use beyond. `python -m benchmarks scale`
writes this page from figures that it has just measured.

- {machine}
- {about}

## What so many GPUs need

At {tokens:,} tokens a second for each GPU:

{needs}

## What a store takes

{ends}

The last columns are the share of a store that is used. Who writes, who serves and the database share the machine here:
on machines of their own each of them takes more. A store is read as well, so plan with 1/{headroom} of it:

{advice}

## Beyond one machine

- **More servers**: any number of `agl store` may serve one PostgreSQL, behind any load balancer: a request needs no
  memory of the one before it. That helps where parsing and serving take more than the database does.
- **Larger tables**: [`?partitions=16`](store.md#postgresql) divides them, so that each index, and each vacuum, is of a
  part of the rows.
- **Beyond one disk**: `agl prune --older-than 7d` bounds it; [operations](operations.md) says what it deletes.
- **Beyond one database**: give each group of vLLM servers and their runners a database of its own. Rollouts of two
  databases have nothing in common, but for the texts and blocks that each of them keeps once.
- **Citus** distributes a table by a column that must be in each of its unique indexes. The tables of a store with
  `?partitions=…` in its URL have such indexes: `rollout_key` in `generations`, `generation_key` in `choices`,
  `rollout_id` in `spans`, `parent` in `blocks`. This was read in its documentation; nothing of it was run.
"""
