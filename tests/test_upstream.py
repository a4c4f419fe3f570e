"""The verdict of `make check-upstream` on vLLM's own tests, run with and without this package."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tools.upstream.comparison import compare
from tools.upstream.runs import Outcome, Outcomes

pytestmark = pytest.mark.tier("check")


def outcomes(**by_test: str) -> Outcomes:
    return {f"tests/test_chat.py::test_{name}": Outcome(outcome) for name, outcome in by_test.items()}


def never(tests: Sequence[str]) -> tuple[Outcomes, Outcomes]:
    pytest.fail(f"run again: {tests}")


def test_equal_outcomes_are_counted_and_not_run_again() -> None:
    both = outcomes(a="passed", b="failed", c="skipped")
    counts = compare(both, both, {}, never).counts()
    assert (counts["compared"], counts["passed in both"], counts["failed in both"], counts["skipped"]) == (3, 1, 1, 1)
    assert counts["differ"] == 0


def test_a_test_that_always_fails_with_us_differs() -> None:
    before, after = outcomes(a="passed", b="passed"), outcomes(a="failed", b="passed")
    compared = compare(before, after, {}, lambda tests: (before, after))
    assert compared.different == {"tests/test_chat.py::test_a": (["passed"] * 4, ["failed"] * 4)}


def test_a_test_that_fails_with_us_most_of_the_time_differs() -> None:
    before, after = outcomes(a="passed"), outcomes(a="failed")
    again = iter([(before, before), (before, after), (before, after)])
    assert compare(before, after, {}, lambda tests: next(again)).counts()["differ"] == 1


def test_a_test_that_fails_once_is_unsteady() -> None:
    before, after = outcomes(a="passed"), outcomes(a="failed")
    counts = compare(before, after, {}, lambda tests: (before, before)).counts()
    assert (counts["differ"], counts["unsteady"]) == (0, 1)


def test_a_test_that_runs_only_without_us_differs() -> None:
    before, after = outcomes(a="passed"), outcomes()
    assert compare(before, after, {}, lambda tests: (before, after)).counts()["differ"] == 1


def test_a_known_difference_is_listed_with_its_reason() -> None:
    before, after = outcomes(a="passed"), outcomes(a="failed")
    known = {"test_chat.py::test_a": "it asserts that there are no ids"}
    compared = compare(before, after, known, never)
    assert compared.counts()["differ, known"] == 1
    assert compared.known["tests/test_chat.py::test_a"] == (["passed"], ["failed"], "it asserts that there are no ids")


def test_a_known_reason_is_for_one_test_only() -> None:
    before, after = outcomes(b="passed"), outcomes(b="failed")
    known = {"test_chat.py::test_a": "it asserts that there are no ids"}
    assert compare(before, after, known, lambda tests: (before, after)).counts()["differ"] == 1
