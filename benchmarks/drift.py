"""The cost of finding why a prompt broke: of one break, with the number of ids, and in a report on all."""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

from agentlightning.drift import Cause, classify
from agentlightning.generation import Choice, Generation, new_id
from agentlightning.sender import Sender
from agentlightning.store import open_store
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Summary, Target, say
from benchmarks.trajectories import run_measured
from tests.drift.breaks import Made, make
from tests.drift.templates import TEMPLATES, Template

ROUNDS, QUICK_ROUNDS = 30, 6
FEW, MANY = 32_000, 1_000_000
MILLISECONDS = 20
# Quadratic work would be ten times as long an id; a million of them do not fit into the processor's caches.
TIMES_LONGER = 1.5
ROLLOUTS, QUICK_ROLLOUTS, CALLS_OF_A_ROLLOUT = 100_000, 500, 10
MEGABYTES = 300
BATCH = 1_000
PLACES: Sequence[tuple[Cause, str]] = (("tool_call", "at the end"), ("header", "in front"))
# What stands in front differs in front, so all ids of both sides are behind the difference.
IN_FRONT: Sequence[Cause] = ("header", "sub_agent")


def measure(quick: bool) -> Part:
    """Everything, in a file that is gone afterwards."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    busy = BusyMeter()
    with busy.running(), tempfile.TemporaryDirectory(prefix="agl-bench-") as name:
        sections = [one_break(rounds), growth(rounds), *report(Path(name), QUICK_ROLLOUTS if quick else ROLLOUTS)]
    return Part("Drift", "", sections, busy.share_of_others())


def one_break(rounds: int) -> Section:
    """Row by row: breaks of each kind, at the end of the ids and in front of them."""
    rows: list[Row] = []
    for template in TEMPLATES:
        for cause, where in PLACES:
            say(f"{template.name}, {where}")
            made = of_length(template, make(cause, template, 1), FEW)
            rows.append(
                Row(f"{template.name}, {where}", Summary.of(milliseconds(template, made, rounds)), None, TARGET)
            )
    return Section(
        "Finding the cause of a break", "ms", f"{FEW:,} ids against {FEW:,}, in one process, vocabulary known.", rows
    )


TARGET = Target(MILLISECONDS)


def growth(rounds: int) -> Section:
    """Compare a million ids with a tenth of them, which takes a tenth of the time if it is linear."""
    template = TEMPLATES[0]
    rows: list[Row] = []
    for cause, where in PLACES:
        say(f"a million ids, {where}")
        per_id = [
            [
                each / length
                for each in milliseconds(template, of_length(template, make(cause, template, 1), length), rounds)
            ]
            for length in (MANY // 10, MANY)
        ]
        rows.append(
            Row.of(where, [1e6 * each for each in per_id[1]], [1e6 * each for each in per_id[0]], Target(TIMES_LONGER))
        )
    return Section("A million ids", "ns an id", f"Against {MANY // 10:,} ids: a ratio of 1 is linear.", rows)


def milliseconds(template: Template, made: Made, rounds: int) -> list[float]:
    found: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        classify(made.before, made.answer_start, made.prompt, template.texts)
        found.append(1000 * (time.perf_counter() - began))
    return found


def of_length(template: Template, made: Made, length: int) -> Made:
    """Lengthen both sides to about so many ids: in front of a break, or behind one that is in front itself."""
    word = template.encode("Why is that? ")
    more = array("i", word * ((length - len(made.before)) // len(word)))
    before, prompt = array("i", made.before), array("i", made.prompt)
    if made.cause in IN_FRONT:
        return Made(made.cause, before + more, len(before) + len(more) - 1, prompt + more)
    return Made(made.cause, more + before, made.answer_start + len(more), more + prompt)


def report(folder: Path, rollouts: int) -> list[Section]:
    """Measure `agl drift` on a file whose every second call breaks."""
    path = folder / "many.db"
    say(f"writing {rollouts:,} rollouts to compare")
    template = TEMPLATES[0]
    made = of_length(template, make("answer_end", template, 1), 2_000)
    sender = Sender(host="h", pid=1, started_at=0, version="1", vocabulary=template.vocabulary)
    with open_store(str(path)) as store:
        store.register_sender(sender)
        waiting: list[Generation] = []
        for number in range(rollouts):
            waiting += calls(made, number)
            if len(waiting) >= BATCH or number == rollouts - 1:
                store.add(waiting, sender.id)
                waiting.clear()
    say("comparing")
    seconds, megabytes = run_measured("agentlightning.cli.drift", ("--store", path, "--brief"))
    about = f"{rollouts:,} rollouts of {CALLS_OF_A_ROLLOUT} calls of some 2,000 ids, of which every second one breaks."
    return [
        Section(
            "Memory of a report", "MB", about, [Row("most at once", Summary.of([megabytes]), None, Target(MEGABYTES))]
        ),
        Section(
            "Speed of a report",
            "calls a second",
            about,
            [Row("calls", Summary.of([rollouts * CALLS_OF_A_ROLLOUT / seconds]))],
        ),
    ]


def calls(made: Made, number: int) -> list[Generation]:
    """Make the calls of a rollout: pairs of which the second one breaks, each in an attempt of its own."""
    before, prompt = array("i", made.before), array("i", made.prompt)
    sides = (before[: made.answer_start], before[made.answer_start :]), (prompt, before[made.answer_start :])
    return [
        Generation(
            id=new_id(),
            request_id="r",
            model="model",
            rollout_id=f"rollout-{number}",
            attempt_id=f"attempt-{place // 2}",
            finished_at=number * CALLS_OF_A_ROLLOUT + place,
            status="finished",
            prompt_token_ids=sides[place % 2][0],
            choices=[Choice(token_ids=sides[place % 2][1], finish_reason="stop")],
        )
        for place in range(CALLS_OF_A_ROLLOUT)
    ]
