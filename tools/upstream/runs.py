"""Files of vLLM's tests, run in a process of their own that may not hang for ever."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.make_env import say
from tools.upstream import outcomes
from tools.upstream.selection import LEFT_OUT

__all__ = ["Mode", "Outcome", "Outcomes", "Runner", "file_of"]

TEST_SECONDS = 400
"""The first test of many files starts a server."""
SILENT_SECONDS = TEST_SECONDS + 100
"""Limit for a test that hangs in a way that pytest cannot end."""
CUT = "cut"
LAST = ("collect", "teardown")
"""The phases after which the outcome is known: of a file that cannot be collected, and of a test."""
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Mode:
    """A way to run them: with or without us, as these variables of the environment have it."""

    name: str
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a test.

    Attributes:
        outcome: passed, failed (in itself, or while it was set up, torn down or collected), skipped, or cut: it hung.
        reason: the last line of what pytest has to say, unless it passed.
    """

    outcome: str
    reason: str = ""
    seconds: float = 0.0


Outcomes = Mapping[str, Outcome]
"""Results, by the name of the test."""


class Runner:
    """Runs files of tests.

    Args:
        source: the folder that has the `tests`.
        scripts: the folder of the interpreter and of the command `vllm`.
        hugging_face: for `HF_HOME`.
        output: the folder that what pytest prints is kept in.
    """

    def __init__(self, source: Path, scripts: Path, hugging_face: Path, output: Path) -> None:
        # The servers that the tests start have sessions of their own, and may outlive their parents. Then they become
        # children of this process, which ends them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._source = source
        self._scripts = scripts
        self._output = output
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("AGL_", "PYTHON", "VLLM"))}
        self._variables = inherited | {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            # Each server imports as much as the last one, and reads it from there.
            "PYTHONPYCACHEPREFIX": str(output.parent / "bytecode"),
            "HF_HOME": str(hugging_face),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(output.parent / "vllm-cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            # Nobody measures how fast it is, and compiling takes longer than the tests.
            "TORCH_COMPILE_DISABLE": "1",
        }

    def run(self, files: Sequence[str], mode: Mode, keep: Callable[[Outcomes], None]) -> dict[str, Outcome]:
        """Run these files, one after the other in one process; after one that hangs, in a new one.

        `keep` gets the outcomes of this run so far, whenever a file is through.
        """
        found: dict[str, Outcome] = {}
        left = list(files)
        while left:
            outcomes_of_run = self._pytest(left, mode, f"{left[0].replace('/', '.')}", keep)
            keep(outcomes_of_run)
            found.update(outcomes_of_run)
            cut = [file_of(test) for test, outcome in outcomes_of_run.items() if outcome.outcome == CUT]
            left = left[left.index(cut[-1]) + 1 :] if cut and cut[-1] in left else []
        return found

    def again(self, tests: Sequence[str], mode: Mode) -> dict[str, Outcome]:
        """Run single tests of one file."""
        return self._pytest(tests, mode, f"{file_of(tests[0]).replace('/', '.')}.again", lambda _: None)

    def _pytest(
        self, what: Sequence[str], mode: Mode, name: str, keep: Callable[[Outcomes], None]
    ) -> dict[str, Outcome]:
        log = self._output / mode.name / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        written = log.with_suffix(".jsonl")
        written.write_text("")
        variables = {**self._variables, **mode.variables, outcomes.VARIABLE: str(written)}
        pytest = (self._scripts / "python", "-m", "pytest", "-p", outcomes.__name__, "-p", "no:cacheprovider")
        options = (
            "-v",
            "-rA",
            f"-k={' and '.join(f'not {name}' for name in LEFT_OUT)}",
            "--continue-on-collection-errors",
            f"--timeout={TEST_SECONDS}",
            "--color=no",
            f"--rootdir={self._source}",
        )
        with log.open("w") as printed:
            process = subprocess.Popen(
                [*pytest, *options, *what],
                cwd=self._source,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
            try:
                _wait(process, written, mode.name, keep)
            finally:
                _end_descendants()
                process.wait()
        found = _read(written)
        if not found:
            # Equal in every mode, it would look like no difference.
            sys.exit(
                f"pytest ran nothing, and ended with status {process.returncode}: {log}\n{log.read_text()[-2000:]}"
            )
        return found


def _wait(process: subprocess.Popen[bytes], written: Path, mode: str, keep: Callable[[Outcomes], None]) -> None:
    """Wait for the process as long as its tests make progress; say which file it is at, and keep those before it."""
    at = ""
    while process.poll() is None and time.time() - written.stat().st_mtime < SILENT_SECONDS:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        found = _read(written)
        *_, last = ("", *found)
        if last and file_of(last) != at:
            at = file_of(last)
            say(f"  {mode}: {at}")
            keep({test: outcome for test, outcome in found.items() if file_of(test) != at})


def file_of(test: str) -> str:
    """The file that a test, by its name, is in."""
    return test.partition("::")[0]


def _end_descendants() -> None:
    """End what a run has left behind, once its tests are through, and the run itself if they are not."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
            process.wait(10)


def _read(written: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    phases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in written.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # it is being written
        phase = json.loads(line)
        test = phase["test"]
        phases[test].append(phase)
        if phase["when"] == "start":
            found[test] = Outcome(CUT, "it did not end")
        elif phase["when"] in LAST:
            found[test] = _outcome(phases[test])
    return found


def _outcome(phases: Sequence[Mapping[str, Any]]) -> Outcome:
    """Combine the phases of a test: failed if a phase failed, else skipped if one was."""
    seconds = sum(phase.get("seconds", 0.0) for phase in phases)
    for outcome in ("failed", "skipped"):
        for phase in phases:
            if phase.get("outcome") == outcome:
                return Outcome(outcome, phase["reason"], seconds)
    return Outcome("passed", seconds=seconds)
