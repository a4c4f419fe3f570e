"""Run what needs no vLLM with each Python from 3.10 on: `python -m tests.other_pythons [VERSION ...]`.

Each has an environment of its own in `.cache/pythons`, kept. Versions that this machine does not have are named. What
came of it is in `docs/releases.md`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.machine import describe_machine
from tests.common.environments import CHECKOUT
from tests.common.interpreters import THIS_PYTHON, VERSIONS, find_python
from tools.lock import ENVIRONMENT
from tools.make_env import say
from tools.peer import environment
from tools.sections import replace_section

PAGE = CHECKOUT / "docs" / "releases.md"
SECTION = "Other Pythons"
INTRODUCTION = f"""\
Everything else on this page ran on Python {THIS_PYTHON}. What needs no vLLM - the hook, the settings, the recorder, the
stores, `agl export` and `agl store` over SQLite - runs on every Python from 3.10 on that `make test-pythons` finds, in
an environment without vLLM; it writes this table.

| Python | passed | failed | skipped | date |
|---|---:|---:|---:|---|
"""
PATHS = (
    *("tests/cli", "tests/server", "tests/store", "tests/test_generation.py"),
    *("tests/test_importhook.py", "tests/test_patching.py", "tests/test_recorder.py", "tests/test_settings.py"),
    *("tests/test_startup.py", "tests/test_rollout_name.py"),
)
REQUIREMENTS = (
    "--editable",
    f"{CHECKOUT}[agentops,parquet,postgresql]",
    *("datasets>=3", "httpx>=0.27", "hypothesis>=6.100", "opentelemetry-exporter-otlp-proto-http>=1.38"),
    *("orjson>=3.10", "pandas>=2", "psutil>=5.9", "pytest>=8,<9.2", "pytest-forked>=1.6", "pytest-xdist>=3.8"),
    "tokenizers>=0.21",
)


def python_of(version: str, python: Path) -> Path:
    """The interpreter of an environment that has this package and what its tests need, without vLLM; made once."""
    project = (CHECKOUT / "pyproject.toml").read_text()
    # The lock is of one Python; for others, what was there when it was written.
    date = ENVIRONMENT.written_at()
    title = f"Python {version} with this checkout"
    return environment(f"pythons/{version}", title, REQUIREMENTS, python, date, project) / "python"


def counts(output: str) -> dict[str, int]:
    """Read from pytest's last line how many passed, failed and were skipped."""
    last = output.rstrip().splitlines()[-1]
    found = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def run_tests(version: str, python: Path) -> tuple[dict[str, int], bool]:
    """Run the tests on this interpreter; returns the counts, and whether all passed."""
    # Without vLLM, `agl doctor` has nothing to say but that.
    left_out = "not postgresql and not doctor"
    command = [python, "-m", "pytest", "--tier=test", "--numprocesses=2", "-k", left_out, *PATHS]
    say(f"Python {version}: the tests that need no vLLM")
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        output = ""
        for line in tests.stdout:
            output += line
            sys.stdout.write(line)
    return counts(output), tests.returncode == 0


def written_rows() -> dict[str, str]:
    """Return the rows of the table as it stands, by version: those that are not run now stay in it."""
    _, _, section = PAGE.read_text().partition(f"## {SECTION}\n")
    return {row[1]: row[0] for row in re.finditer(r"^\| (3\.\d+) \|.*\n", section, re.MULTILINE)}


def main(versions: Iterable[str]) -> None:
    """Run them; exits with 1 where any fails."""
    rows, all_well = written_rows(), True
    for version in versions:
        if version == THIS_PYTHON:
            continue
        python = find_python(version)
        if python is None:
            say(f"Python {version}: not found, not run")
            continue
        found, is_well = run_tests(version, python_of(version, python))
        all_well &= is_well
        rows[version] = f"| {version} | {' | '.join(map(str, found.values()))} | {describe_machine()['date']} |\n"
        table = [rows[each] for each in VERSIONS if each in rows]
        replace_section(PAGE, SECTION, INTRODUCTION + "".join(table))
    sys.exit(0 if all_well else 1)


if __name__ == "__main__":
    main(sys.argv[1:] or VERSIONS)
