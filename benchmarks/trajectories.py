"""The cost of merging calls to rows: against reading them, with the number of calls, and in an export."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from agentlightning.generation import Choice, Generation, new_id
from agentlightning.store import open_store
from agentlightning.store.calls import MOST_CALLS
from agentlightning.trajectory import AttemptCalls, Call, merge
from benchmarks.environments import interleaved
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say

ROUNDS = 30
QUICK_ROUNDS = 6
CALLS, IDS = 50, 32_000
FEW, MANY, BRANCHES = 100, 1_000, 8
ANSWER = 64
VOCABULARY = range(100_000)
ROLLOUTS, QUICK_ROLLOUTS, CALLS_OF_A_ROLLOUT = 10_000, 500, 10
BATCH = 1_000
MEGABYTES = 300
MILLION, QUICK_CALLS = 1_000_000, 120_000
CALLS_OF_A_LARGE_ROLLOUT = 1_000
SHORT = 16
SAMPLING = '{"temperature":0.7,"top_p":0.95}'

COMMAND = """\
import importlib, json, pathlib, re, sys, time
main = importlib.import_module(sys.argv[1]).main
started = time.perf_counter()
status = main(sys.argv[2:])
took = time.perf_counter() - started
# Of this process alone; what getrusage says begins with the memory of the process that started it.
most = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(json.dumps([status, took, int(most) / 1024]))
"""


def measure(quick: bool) -> Part:
    """Everything, in files that are gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    busy = BusyMeter()
    with busy.running(), tempfile.TemporaryDirectory(prefix="agl-bench-") as name:
        folder = Path(name)
        sections = [
            reading(folder, rounds),
            growth(rounds),
            *export(folder, QUICK_ROLLOUTS if quick else ROLLOUTS),
            *many_calls(folder, QUICK_CALLS if quick else MILLION),
        ]
    return Part("Trajectories", "", sections, busy.share_of_others())


def conversation(calls: int, ids: int, first: int = 0) -> Iterator[tuple[array[int], array[int]]]:
    """Prompt and answer of each call, of which the last has so many ids."""
    draw = random.Random(first)
    context = array("i", [first])
    for number in range(1, calls + 1):
        length = number * ids // calls - len(context) - ANSWER
        prompt = context + array("i", draw.choices(VOCABULARY, k=length))
        answer = array("i", draw.choices(VOCABULARY, k=ANSWER))
        yield prompt, answer
        context = prompt + answer


def generations(rollout: int, calls: int, ids: int) -> list[Generation]:
    """The calls of a rollout."""
    logprobs = array("f", [-0.5] * ANSWER)
    return [
        Generation(
            id=new_id(),
            request_id=f"chatcmpl-{rollout}-{number}",
            model="model",
            rollout_id=f"rollout-{rollout}",
            attempt_id="attempt",
            finished_at=rollout * calls + number,
            status="finished",
            prompt_token_ids=prompt,
            sampling_params=SAMPLING,
            choices=[Choice(token_ids=answer, logprobs=logprobs, finish_reason="stop")],
        )
        for number, (prompt, answer) in enumerate(conversation(calls, ids, rollout))
    ]


def reading(folder: Path, rounds: int) -> Section:
    """Row 1: the trajectories of a rollout, to its generations."""
    measured: dict[str, list[float]] = {"generations": [], "trajectories": []}
    with open_store(str(folder / "one.db")) as store:
        store.add(generations(0, CALLS, IDS))
        for what in interleaved(list(measured), rounds, "reading, timed"):
            started = time.perf_counter()
            if what == "generations":
                assert len([*store.generations(rollout_id="rollout-0")]) == CALLS
            else:
                assert [len(row.token_ids) for row in store.trajectories("rollout-0")] == [IDS]
            measured[what].append(1 / (time.perf_counter() - started))
    read, merged = measured["generations"], measured["trajectories"]
    rows = [
        Row.of("its generations", read, read),
        Row.of("its trajectory", merged, read, Target(0.8, at_least=True)),
    ]
    about = f"A rollout of {CALLS} calls that grow to {IDS:,} ids, in a SQLite file."
    return Section("Reading a rollout", "a second", about, rows)


def growth(rounds: int) -> Section:
    """Row 2: the merging alone, of few calls and of ten times as many."""
    attempts = {count: attempt(count) for count in (FEW, MANY)}
    measured: dict[int, list[float]] = {count: [] for count in attempts}
    for count in interleaved(list(attempts), rounds, "merging, timed"):
        started = time.perf_counter()
        assert len(merge(attempts[count]).rows) == BRANCHES
        measured[count].append((time.perf_counter() - started) * 1e3)
    rows = [
        Row.of(f"{FEW} calls", measured[FEW], measured[FEW]),
        Row.of(f"{MANY:,} calls", measured[MANY], measured[FEW], Target(12)),
    ]
    about = f"An attempt of {BRANCHES} branches, which grow to {IDS:,} ids each, in as many calls as they have."
    return Section("Merging an attempt", "ms", about, rows)


def attempt(count: int) -> AttemptCalls:
    """Calls of branches that share their first ids, in the order in which they finish: one of each branch in turn."""
    calls: list[Call] = []
    for branch in range(BRANCHES):
        # The last branches have one call less where the number cannot be divided.
        of_branch = len(range(branch, count, BRANCHES))
        for number, (prompt, answer) in enumerate(conversation(of_branch, IDS, branch)):
            calls.append(
                Call(
                    generation_id=f"{number:06}-{branch}",
                    finished_at=number,
                    prompt_token_ids=prompt,
                    response_token_ids=answer,
                    logprobs=array("f", [-0.5] * ANSWER),
                    sampling_params=SAMPLING,
                )
            )
    return AttemptCalls(calls=sorted(calls, key=lambda call: call.generation_id))


def export(folder: Path, rollouts: int) -> list[Section]:
    """Row 3: memory and speed of an export of all."""
    path = folder / "many.db"
    say(f"writing {rollouts:,} rollouts to export")
    with open_store(str(path)) as store:
        waiting: list[Generation] = []
        for rollout in range(rollouts):
            waiting += generations(rollout, CALLS_OF_A_ROLLOUT, 2_000)
            if len(waiting) >= BATCH or rollout == rollouts - 1:
                store.add(waiting)
                waiting.clear()
    say("exporting")
    options = ("--store", path, "--what", "trajectories", "--format", "parquet", "-o", folder / "rows.parquet")
    seconds, megabytes = run_measured("agentlightning.cli.export", options)
    about = f"{rollouts:,} rollouts of {CALLS_OF_A_ROLLOUT} calls that grow to 2,000 ids, to one Parquet file."
    memory = Row("most at once", Summary.of([megabytes]), None, Target(MEGABYTES))
    return [
        Section("Memory of an export", "MB", about, [memory]),
        Section("Speed of an export", "rows a second", about, [Row("rows", Summary.of([rollouts / seconds]))]),
    ]


def many_calls(folder: Path, calls: int) -> list[Section]:
    """Rows of memory and time for attempts and stores of very many calls, each of which is a row."""
    stores = {
        f"{MOST_CALLS:,} calls in one attempt, as many as are read": (MOST_CALLS, MOST_CALLS, 0),
        f"{calls:,} calls in one attempt, refused by a sentence": (calls, calls, 1),
        f"{calls:,} calls in a store, {CALLS_OF_A_LARGE_ROLLOUT:,} in each attempt": (
            calls,
            CALLS_OF_A_LARGE_ROLLOUT,
            0,
        ),
    }
    memory, time_taken = list[Row](), list[Row]()
    for number, (label, (count, of_each, status)) in enumerate(stores.items()):
        say(f"writing {label}")
        path = folder / f"calls-{number}.db"
        with open_store(str(path)) as store:
            for first in range(0, count, BATCH):
                store.add([short_call(each, each // of_each) for each in range(first, first + BATCH)])
        say("exporting")
        chosen = ("--rollout", "rollout-0") if count == of_each else ()
        options = ("--store", path, "--what", "trajectories", *chosen, "-o", folder / f"calls-{number}.jsonl")
        seconds, megabytes = run_measured("agentlightning.cli.export", options, status)
        memory.append(Row(label, Summary.of([megabytes])))
        time_taken.append(Row(label, Summary.of([seconds])))
    about = f"Prompts of {SHORT} ids that share nothing, to a file of JSON Lines."
    return [
        Section("Memory of very many calls", "MB", about, memory),
        Section("Time for very many calls", "seconds", about, time_taken),
    ]


def short_call(number: int, rollout: int) -> Generation:
    return Generation(
        id=new_id(),
        request_id=f"chatcmpl-{number}",
        model="model",
        rollout_id=f"rollout-{rollout}",
        attempt_id="attempt",
        finished_at=number,
        status="finished",
        prompt_token_ids=array("i", range(number, number + SHORT)),
        sampling_params=SAMPLING,
        choices=[Choice(token_ids=array("i", [number]), logprobs=array("f", [-0.5]), finish_reason="stop")],
    )


def run_measured(module: str, options: Sequence[object], expected: int = 0) -> tuple[float, float]:
    """Run a command in a process of its own; return the seconds that it took, and the most MB that it had at once.

    Args:
        expected: its exit status.
    """
    output = subprocess.run(
        [sys.executable, "-c", COMMAND, module, *map(str, options)],
        stdout=subprocess.PIPE,
        check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("AGL_")},
    ).stdout
    status, seconds, megabytes = json.loads(output.splitlines()[-1])
    assert status == expected
    return seconds, megabytes
