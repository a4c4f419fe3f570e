"""`python -m benchmarks.training [PART...]`: what rows are made of, and what a trainer learns from them.

The part `table` runs `examples/train.py` with each kind of rows and several seeds, and writes the table and the picture
into `docs/training.md`. The parts `trl` and `verl` run it once with that trainer, and write what it printed into its
page. It takes some minutes for each kind of rows, and for each trainer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.report import say
from examples.plot import png
from examples.train import GENERATIONS, HEAD, MODES, STEPS, TASKS, TRAINERS, Step, line
from tools.sections import replace_section

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "training.md"
PAGES = {trainer: CHECKOUT / "docs" / f"training-{trainer}.md" for trainer in TRAINERS}
PICTURE = CHECKOUT / "docs" / "images" / "training.png"
TITLE = "Exact rows and others, measured"
PRINTED = "What the demo printed"
SEEDS = 5
LEARNT = 0.9

Steps = Sequence[Mapping[str, Any]]


def total(name: str, per: str = "rollouts") -> Callable[[Steps], float]:
    """Return a measure: the sum of a field over the steps, for each of another one."""
    return lambda steps: sum(step[name] for step in steps) / sum(step[per] for step in steps)


def steps_to(reward: float) -> Callable[[Steps], float]:
    """Return a measure: the first step with this reward; one more than there are where none has it."""
    return lambda steps: next((n for n, step in enumerate(steps, 1) if step["reward"] >= reward), len(steps) + 1)


def mean_gap(steps: Steps) -> float:
    """Return the mean difference over all ids that have a logprob of the engine."""
    counts = [step["tokens"] - step["unknown"] for step in steps]
    return sum(step["mean"] * count for step, count in zip(steps, counts, strict=True)) / sum(counts)


def lines(steps: int) -> tuple[tuple[str, Callable[[Steps], float], Callable[[float], str]], ...]:
    """Return what each line of the table says, how it is found in the steps of a run, and how it is written."""
    return (
        ("masked rollouts", total("masked"), "{:.1%}".format),
        ("rows a rollout", total("rows"), "{:.2f}".format),
        ("trained ids a rollout", total("tokens"), "{:.1f}".format),
        ("of the trained ids, not what the engine sampled there", total("differ", "tokens"), "{:.1%}".format),
        ("of the trained ids, without a logprob of the engine", total("unknown", "tokens"), "{:.1%}".format),
        ("logprobs of engine and trainer differ by (mean)", mean_gap, "{:.2g}".format),
        ("the same, highest", lambda run: max(step["highest"] for step in run), "{:.2g}".format),
        (
            "effective sample size of the importance weights (lowest step)",
            lambda run: min(step["effective"] for step in run),
            "{:.1%}".format,
        ),
        ("seconds a step", lambda run: statistics.median(step["seconds"] for step in run), "{:.1f}".format),
        (f"steps until the reward is {LEARNT}", steps_to(LEARNT), lambda n: f"{n:.0f}" if n <= steps else f"> {steps}"),
        ("reward in the last step", lambda run: run[-1]["reward"], "{:.3f}".format),
    )


def measure(mode: str, seeds: int, steps: int, trainer: str = "trl") -> list[Steps]:
    """Train with one kind of rows, once for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        program = ("-m", "tools.trainers", "-m", "examples.train", "--rows", mode, "--trainer", trainer)
        options = ("--seeds", f"{seeds}", "--steps", f"{steps}", "--results", f"{results}")
        subprocess.run([sys.executable, *program, *options], check=True, cwd=CHECKOUT, stdin=subprocess.DEVNULL)
        return [*json.loads(results.read_text()).values()]


def table(found: Mapping[str, Sequence[Steps]], steps: int) -> str:
    """Return the modes side by side: a line for each measure, with the median and the quartiles of all seeds."""
    rows = [f"|  | {' | '.join(f'`{mode}`' for mode in found)} |", f"|---|{'---:|' * len(found)}"]
    for label, measured, written in lines(steps):
        cells = [spread([measured(run) for run in runs], written) for runs in found.values()]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Write a median, and the quartiles where there are several values and they differ."""
    middle = written(statistics.median(values))
    if len(values) == 1:
        return middle
    low, _, high = (written(each) for each in statistics.quantiles(values, n=4, method="inclusive"))
    return middle if low == high else f"{middle} ({low} - {high})"


def printed(steps: Steps, trainer: str) -> str:
    """Return the text of the section of a trainer's page: what the demo printed, every third step."""
    machine = ", ".join(describe_machine().values())
    lines = "\n".join([HEAD, *(line(n, Step(**step)) for n, step in enumerate(steps, 1) if n % 3 == 1)])
    command = "make demo-train" if trainer == "trl" else f"make demo-train TRAINER={trainer}"
    return f"""\
Every third step of `{command}`, written by `python -m benchmarks.training {trainer}` on
{machine}. [The columns](training.md#the-demo):

```text
{lines}
```"""


def section(found: Mapping[str, Sequence[Steps]], seeds: int, steps: int) -> str:
    """Return the text below the heading."""
    machine = ", ".join(describe_machine().values())
    return f"""\
Written by `python -m benchmarks.training`: {seeds} runs of {steps} steps for each kind of rows, each with other random
weights, and {TASKS * GENERATIONS} rollouts a step. Truncated importance sampling corrects the loss of `exact` and
`continued` rows; that of `text` rows it does not, as the engine's logprobs do not belong to their ids. Medians, and
quartiles in brackets. Measured on\n{machine}.

{table(found, steps)}

![The reward by step, with each kind of rows: the median of all runs, and their quartiles](images/{PICTURE.name})"""


def write_table(seeds: int, steps: int) -> None:
    """Train with each kind of rows, and write the table and the picture."""
    found: dict[str, list[Steps]] = {}
    for mode in MODES:
        say(f"rows: {mode}")
        found[mode] = measure(mode, seeds, steps)
    png({mode: [[step["reward"] for step in steps] for steps in runs] for mode, runs in found.items()}, PICTURE)
    replace_section(PAGE, TITLE, section(found, seeds, steps))
    say(f"written: {PAGE.relative_to(CHECKOUT)}, {PICTURE.relative_to(CHECKOUT)}")


def write_page(trainer: str, steps: int) -> None:
    """Train once with a trainer, and write what was printed into its page."""
    say(f"trainer: {trainer}")
    [run] = measure("exact", 1, steps, trainer)
    replace_section(PAGES[trainer], PRINTED, printed(run, trainer))
    say(f"written: {PAGES[trainer].relative_to(CHECKOUT)}")


def main() -> None:
    parts = ("table", *PAGES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(parts)}; else all of them")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if unknown := {*options.parts} - {*parts}:
        parser.error(f"no part is called {' or '.join(sorted(unknown))}")
    for part in options.parts or parts:
        if part == "table":
            write_table(options.seeds, options.steps)
        else:
            write_page(part, options.steps)


if __name__ == "__main__":
    main()
