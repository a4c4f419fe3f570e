"""`docs/releases.md`: which tests were run on each release, and what came of them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import describe_machine
from tests.common.environments import CHECKOUT
from tests.releases.environments import FOLDER, scripts
from tests.releases.table import COMPILED, RELEASES, Release
from tools.sections import replace_section

PAGE = CHECKOUT / "docs" / "releases.md"

SECTION = "The same tests on each release"
INTRODUCTION = """\
Written by the tests, which the command below runs on each release, in an environment of its own; run it to have it
written again.

```bash
make test-releases
```

Every release gets the same tests: chat and completions, plain and streamed, several choices and prompts, stop strings,
logprobs, usage, tool calls beside a parser, requests that want no ids, clients that hang up, several API servers, and
removing the patches. They all go over HTTP to the release's own server. Where its compiled part does not run on the
machine, the tokens come from a worker of the tests (`tests/releases/worker.py`) that has no model: what stands above a
worker, from the API server down to the engine's scheduler, is vLLM's. Elsewhere vLLM runs whole; a release that has no
CPU build yet is a hybrid: all of its own Python, over the compiled part of the newest that has one
(`tests/releases/hybrid.py`). [Supported releases](#supported-releases) summarises the results.

"""
COLUMNS = ("vLLM", "engine", "worker", "pydantic", "passed", "failed", "date")


def release_of(item: pytest.Item) -> Release:
    """The row that a test is for."""
    return item.callspec.params["release"]  # type: ignore[attr-defined]


class Report:
    """A pytest plugin that counts, keeps each release's result, and writes the page of all that are kept."""

    def __init__(self, releases: Sequence[Release]) -> None:
        self._releases = releases
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        # What fails while a server is started or stopped failed too.
        if report.when == "call" or report.failed:
            self._outcomes[release_of(item).name][report.outcome] += 1
        return report

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        for release in self._releases:
            outcomes = {name: self._outcomes[release.name][name] for name in ("passed", "failed")}
            pydantic = version_of("pydantic", release)
            _kept(release).write_text(json.dumps({**outcomes, "pydantic": pydantic, **describe_machine()}))
        kept = [release for release in RELEASES if _kept(release).exists()]
        replace_section(PAGE, SECTION, INTRODUCTION + "".join(_page(kept)))


def version_of(package: str, release: Release) -> str:
    """The version that is installed in the release's environment."""
    [site_packages] = scripts(release).parent.glob("lib/python*/site-packages")
    return next(iter(distributions(name=package, path=[str(site_packages)]))).version


def _kept(release: Release) -> Path:
    return FOLDER / f"{release.name}.json"


def _page(run: Sequence[Release]) -> Iterator[str]:
    results = [json.loads(_kept(release).read_text()) for release in run]
    for name in ("processor", "system", "Python"):
        yield f"- {name}: {', '.join(dict.fromkeys(result[name] for result in results))}\n"
    yield f"\n| {' | '.join(COLUMNS)} |\n|---|---|---|---|---:|---:|---|\n"
    for release, result in zip(run, results, strict=True):
        build = f" ({release.build})" if release.build not in (None, release.version) and not release.hybrid else ""
        worker = "vLLM's" if release.worker == COMPILED else "the tests'"
        if release.hybrid:
            worker += f", hybrid over {release.build}"
        counts = (str(result["passed"]), str(result["failed"]))
        yield f"| {' | '.join((release.version + build, release.engine, worker, result['pydantic'], *counts))} "
        yield f"| {result['date']} |\n"
    yield "\nLeft out is what a release breaks by itself, patched or not:\n\n"
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for release in run:
        for check_and_why in release.left_out.items():
            left_out[check_and_why].append(release.name)
    for (check, why), releases in left_out.items():
        yield f"- {check} ({', '.join(releases)}): {why}.\n"
