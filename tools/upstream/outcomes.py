"""A pytest plugin for vLLM's own tests: what becomes of each, a line of JSON as soon as it is known.

A run that is cut off has then said which tests it had finished, and which one it was in.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "UPSTREAM_OUTCOMES"
"""Names the file that they are written to."""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    Path(os.environ[VARIABLE]).touch()  # it makes progress
    if report.failed:
        _write(test=report.nodeid, when="collect", outcome="failed", reason=_last_line(report.longreprtext))


def pytest_collection_finish() -> None:
    # vLLM's fixtures unfreeze and collect garbage after each test, which takes a second. Imported modules never become
    # garbage, so that they stay out of it.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, when="start")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
    reason = "" if report.passed else _last_line(report.longreprtext)
    _write(test=report.nodeid, when=report.when, outcome=outcome, seconds=round(report.duration, 2), reason=reason)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[-1].removeprefix("E ").strip()[:300]


def _write(**what: Any) -> None:
    with Path(os.environ[VARIABLE]).open("a") as outcomes:
        outcomes.write(json.dumps(what) + "\n")
