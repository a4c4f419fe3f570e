"""The three tiers of tests: what each promises, and which tests are in it. A pytest plugin, with the option `--tier`.

A test is in the tier that its closest `tier` marker names, and in all larger ones; without a marker, in `test`:

    pytestmark = pytest.mark.tier("check")

With arguments by name, it counts for those of a test's parameters alone:

    @pytest.mark.tier("all", new_store="postgresql")

Of several markers on one test, the lowest that counts is the closest.

A test that takes longer than its tier allows fails the run, unless `@pytest.mark.takes_long("why")` says why it may.
Times are divided by those of some fixed work in the same run, so that neither a slow machine nor a busy one matters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.common import pace

__all__ = ["LARGEST", "TIERS", "Tier", "selected", "thorough"]


@dataclass(frozen=True)
class Tier:
    """A selection of the tests, each with a make target.

    Attributes:
        target: the make target that runs it.
        promise: what it runs.
        takes: how long the target takes on two cores.
        seconds: that one test may take, where `pace.fixed_work` takes `pace.REFERENCE_SECONDS`; None for any.
    """

    name: str
    target: str
    promise: str
    takes: str
    seconds: float | None


TIERS = (
    Tier("check", "check", "what starts no server and no interpreter of another environment", "a minute", 5),
    Tier("test", "test", "every part, with real servers, clients and databases", "a quarter of an hour", 60),
    Tier("all", "test-all", "also endurance and every way to install", "an hour and a half", None),
)
LARGEST = TIERS[-1].name
_NAMES = [tier.name for tier in TIERS]
SECONDS_BETWEEN = 1.0
"""The number of times that it is measured how quick the machine is."""
_MEASURED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    promises = "; ".join(f"{tier.name}: {tier.promise}" for tier in TIERS)
    parser.addoption("--tier", choices=_NAMES, default=LARGEST, help=f"which tests to run ({promises})")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "tier(name, **params): the smallest of the tiers that the test, or one with these parameters, is in",
    )
    config.addinivalue_line("markers", "takes_long(why): the test may take longer than its tier allows")
    # Of several processes, only the one that reports judges.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Limits(), "limits")


def pytest_report_header(config: pytest.Config) -> str:
    tier = TIERS[_NAMES.index(selected(config))]
    return f"tier {tier.name}: {tier.promise}; make {tier.target} takes {tier.takes} on two quiet cores"


def selected(config: pytest.Config) -> str:
    """The name of the tier that runs."""
    return str(config.getoption("--tier"))


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Tell whether endurance lasts as long as in the largest tier; a few times are enough for the others."""
    return selected(pytestconfig) == LARGEST


def tier_of(item: pytest.Item) -> Tier:
    """The smallest that has this test.

    Raises:
        pytest.UsageError: if its marker names none.
    """
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    markers = (each for each in item.iter_markers("tier") if each.kwargs.items() <= params.items())
    name = next((each.args[0] for each in markers), "test")
    if name not in _NAMES:
        raise pytest.UsageError(f"{item.nodeid} is in no tier: {name!r}")
    return TIERS[_NAMES.index(name)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Not even imported: half of the files import vLLM, which takes a quarter of a minute.
    if selected(config) == "check" and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return 'mark.tier("check")' not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    largest = _NAMES.index(selected(config))
    left_out = [item for item in items if _NAMES.index(tier_of(item).name) > largest]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    tier = tier_of(item)
    is_endurance = selected(item.config) == LARGEST and "thorough" in getattr(item, "fixturenames", ())
    if tier.seconds is not None and not is_endurance and not item.get_closest_marker("takes_long"):
        item.user_properties.append(("may take", tier.seconds))
    if time.monotonic() - item.config.stash.get(_MEASURED, 0.0) > SECONDS_BETWEEN:
        item.user_properties.append(("fixed work", pace.fixed_work()))
        item.config.stash[_MEASURED] = time.monotonic()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = pace.seconds_not_counted()
    yield
    item.user_properties.append(("not counted", pace.seconds_not_counted() - before))


@dataclass(eq=False)
class Limits:
    """Find the tests that take longer than their tiers allow, and fail the run for them."""

    works: list[float] = field(default_factory=list)
    tests: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Seconds that each test took, and that it may take."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = {name: float(value) for name, value in report.user_properties if isinstance(value, float | int)}
        if report.when != "call":
            return
        if "fixed work" in told:
            self.works.append(told["fixed work"])
        if "may take" in told:
            took = report.duration - told.get("not counted", 0.0)
            self.tests[report.nodeid] = (took, told["may take"])

    def slowness(self) -> float:
        """Return how often as long fixed work took in this run as on the machine that the limits are of; 1 at least.

        A quicker machine makes nothing of a test shorter that waits, such as for a report that is sent each second.
        """
        return max(1.0, statistics.mean(self.works) / pace.REFERENCE_SECONDS) if self.works else 1.0

    def too_long(self) -> dict[str, tuple[float, float]]:
        slowness = self.slowness()
        return {name: (took, may * slowness) for name, (took, may) in self.tests.items() if took > may * slowness}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and self.too_long():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, (took, may) in self.too_long().items():
            terminalreporter.write_line(
                f"TOO LONG {name}: {took:.1f} s, of {may:.1f} s here: "
                f"make it quicker, put it into a larger tier, or say why it may with pytest.mark.takes_long",
                red=True,
            )
