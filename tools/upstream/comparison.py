"""Comparison of the outcomes of vLLM's tests with and without this package."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tools.upstream.runs import Outcomes, file_of

__all__ = ["Comparison", "compare"]

MISSING = "missing"
REPEATS = 3


@dataclass
class Comparison:
    """Two runs of the same tests.

    Attributes:
        same: the outcome of each test that has the same one in both.
        unsteady: what came of each test that ended differently, and then did not: without us, and with us, each time.
        known: the same of each test that differs for a reason that is known, and the reason.
        different: the same of each test that differs otherwise.
    """

    same: dict[str, str] = field(default_factory=dict)
    unsteady: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    known: dict[str, tuple[list[str], list[str], str]] = field(default_factory=dict)
    different: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        of_same = Counter(self.same.values())
        both = {f"{outcome} in both": of_same[outcome] for outcome in ("passed", "failed")}
        others = {"skipped": of_same["skipped"], "cut": of_same["cut"], "unsteady": len(self.unsteady)}
        total = len(self.same) + len(self.unsteady) + len(self.known) + len(self.different)
        different = {"differ, known": len(self.known), "differ": len(self.different)}
        return {"compared": total, **both, **others, **different}


def compare(
    without: Outcomes,
    instrumented: Outcomes,
    known: Mapping[str, str],
    again: Callable[[Sequence[str]], tuple[Outcomes, Outcomes]],
) -> Comparison:
    """Compare two runs; `again` runs tests of one file alone, without us and with us.

    A test that differs is run three times more: it counts where what mostly comes of it with us never does without us.
    """
    comparison = Comparison()
    differing: dict[str, list[str]] = defaultdict(list)
    for test in sorted({*without, *instrumented}):
        before, after = _outcome(without, test), _outcome(instrumented, test)
        if before == after:
            comparison.same[test] = before
        elif reason := next((known[end] for end in known if test.endswith(end)), None):
            comparison.known[test] = ([before], [after], reason)
        else:
            differing[file_of(test)].append(test)
    for tests in differing.values():
        befores = {test: [_outcome(without, test)] for test in tests}
        afters = {test: [_outcome(instrumented, test)] for test in tests}
        for _ in range(REPEATS):
            once_without, once_with = again(tests)
            for test in tests:
                befores[test].append(_outcome(once_without, test))
                afters[test].append(_outcome(once_with, test))
        for test in tests:
            [(mostly, _)] = Counter(afters[test]).most_common(1)
            kind = comparison.unsteady if mostly in befores[test] else comparison.different
            kind[test] = (befores[test], afters[test])
    return comparison


def _outcome(outcomes: Outcomes, test: str) -> str:
    return outcomes[test].outcome if test in outcomes else MISSING
