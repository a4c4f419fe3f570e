"""`docs/releases.md`: what was run on each release, and what came of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import distributions
from typing import Any

import pytest

from benchmarks.machine import describe_machine
from tests.common.environments import CHECKOUT
from tests.releases.environments import scripts
from tests.releases.table import COMPILED, RELEASES, Release

PAGE = CHECKOUT / "docs" / "releases.md"

HEADER = """\
# Releases

Written by the command below, in an environment for each release; run it to have it written again, or with
`RELEASES="0.8.5 0.32.0"` to have these rows written again.

```bash
make test-releases
```

{machine}

The same checks are made on every release: chat and completions, plain and streamed, several choices and prompts, stop
strings, logprobs, usage, tool calls beside a parser, requests that want no ids, clients that hang up, several API
servers, and taking the patches off. All is asked over HTTP of the release's own server. Where its compiled part does
not run on the machine, the tokens come from a worker of the tests (`tests/releases/worker.py`) that has no model: what
stands above a worker, from the API server down to the engine's scheduler, is vLLM's. Elsewhere vLLM runs whole.

| vLLM | engine | worker | pydantic | run on | passed | failed | left out |
|---|---|---|---|---|---:|---:|---|
"""


def release_of(item: pytest.Item) -> Release:
    """The row that a test is for."""
    return item.callspec.params["release"]  # type: ignore[attr-defined]


def version_of(package: str, release: Release) -> str:
    """Of what is installed in the release's environment."""
    [site_packages] = scripts(release).parent.glob("lib/python*/site-packages")
    [distribution] = distributions(name=package, path=[str(site_packages)])
    return distribution.version


class Report:
    """A pytest plugin that counts, and writes the rows of the releases that were run."""

    def __init__(self, releases: Sequence[Release]) -> None:
        self._releases = releases
        self._machine = describe_machine()
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        # What fails while a server is started or stopped failed too.
        if report.when == "call" or report.failed:
            self._outcomes[release_of(item).name][report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        machine = "\n".join(f"- {name}: {value}" for name, value in self._machine.items() if name != "date")
        earlier = PAGE.read_text().splitlines(keepends=True) if PAGE.exists() else []
        rows = [row for release in RELEASES for row in self._rows(release, earlier)]
        PAGE.write_text(HEADER.format(machine=machine) + "".join(rows))

    def _rows(self, release: Release, earlier: Sequence[str]) -> list[str]:
        """The release's row: a new one, or that of an earlier run, if there was one."""
        row = self._row(release)
        start = " | ".join(row.split(" | ")[:2])
        return [row] if release in self._releases else [line for line in earlier if line.startswith(f"{start} |")]

    def _row(self, release: Release) -> str:
        outcomes = self._outcomes[release.name]
        build = release.build if release.build and release.build != release.version else ""
        worker = "vLLM's" if release.worker == COMPILED else "the tests'"
        left_out = "; ".join(f"{check}: {why}" for check, why in release.left_out.items())
        cells = (
            f"{release.version}{f' ({build})' if build else ''}",
            release.engine,
            worker,
            version_of("pydantic", release) if release in self._releases else "",
            self._machine["date"],
            str(outcomes["passed"]),
            str(outcomes["failed"]),
            left_out,
        )
        return f"| {' | '.join(cells)} |\n"
