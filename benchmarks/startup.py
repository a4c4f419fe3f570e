"""What the `.pth` file and the import hook cost every Python of an environment: `python -m benchmarks.startup`.

Makes fresh virtual environments with this interpreter's Python, one with nothing, one with this checkout's wheel and
one for each of its peers (the newest release on the package index), and compares how they start and import. Nothing
but the standard library runs here; needs pip beside this interpreter and a network. valgrind, where it is there,
counts instructions: those are the same in each run, whatever else the machine does, but leave out what the kernel
does for a process, so time is measured as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "benchmarks" / "RESULTS.md"
WIDTH = 100

ROUNDS = 600
QUICK_ROUNDS = 30
MODULES = 500

PASS = ("-c", "pass")


@dataclass(frozen=True)
class Configuration:
    """One way to start Python.

    Attributes:
        label: what the tables call it; the version of its first requirement is put after the first word.
        venv: the environment it starts in; two configurations may share one.
        requires: what pip installs there.
        command: what stands where `python` does; a name that is in the environment's bin is taken from there.
        env: set on top of a bare environment, so that nothing of this shell is measured.
        sitecustomize: the text of that module, if there is to be one.
        check: an expression that is true in a process that starts like this, lest something else be measured.
        slow: three times as slow as a clean start, and more: measured in fewer rounds, and not counted.
    """

    label: str
    venv: str
    requires: tuple[str, ...] = ()
    command: tuple[str, ...] = ("python",)
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    sitecustomize: str = ""
    check: str = "True"
    slow: bool = False


def has_finder(package: str) -> str:
    """The check that a finder of this package is on `sys.meta_path`."""
    return f"any(type(finder).__module__.split('.')[0] == {package!r} for finder in sys.meta_path)"


OURS = "agentlightning"
CLEAN = Configuration("clean", "clean", check="len(sys.meta_path) == 3")
CLEAN_AGAIN = Configuration("clean, a second environment", "clean-again", check=CLEAN.check)
OFF = Configuration("agentlightning, off", OURS, (OURS,), check=f"{OURS!r} not in sys.modules and __import__({OURS!r})")
ARMED = Configuration(
    "agentlightning, armed", OURS, (OURS,), env={"AGL_INSTRUMENT": "1"}, check=has_finder("agentlightning")
)
WRAPT = Configuration(
    "wrapt, one hook in sitecustomize",
    "wrapt",
    ("wrapt",),
    sitecustomize='import wrapt\n\nwrapt.register_post_import_hook(lambda module: None, "vllm")\n',
    check=has_finder("wrapt"),
    slow=True,
)
DDTRACE = Configuration(
    "ddtrace-run",
    "ddtrace",
    ("ddtrace",),
    command=("ddtrace-run", "python"),
    # Without an agent they would only wait and complain, which is not what is compared.
    env={"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"},
    check=has_finder("ddtrace"),
    slow=True,
)
NEWRELIC = Configuration(
    "newrelic-admin run-python",
    "newrelic",
    ("newrelic",),
    command=("newrelic-admin", "run-python"),
    env={"NEW_RELIC_DEVELOPER_MODE": "true"},  # without it or a key, newrelic does nothing; with it, nothing is sent
    check=has_finder("newrelic"),
    slow=True,
)
PEERS = (
    Configuration(
        "coverage, off",
        "coverage",
        ("coverage",),
        check="'coverage' not in sys.modules and "
        "__import__('glob').glob(sys.prefix + '/lib/python*/site-packages/*coverage*.pth')",
    ),
    Configuration("setuptools", "setuptools", ("setuptools",), check="'_distutils_hack' in sys.modules"),
    Configuration(
        "autowrapt, off",
        "autowrapt",
        ("autowrapt",),
        check="'autowrapt' in sys.modules and 'wrapt' not in sys.modules",
    ),
    Configuration(
        "autowrapt, on",
        "autowrapt",
        ("autowrapt",),
        env={"AUTOWRAPT_BOOTSTRAP": "nothing"},
        check="'wrapt' in sys.modules",
        slow=True,
    ),
    WRAPT,
    NEWRELIC,
    Configuration(
        "opentelemetry-instrument",
        "opentelemetry",
        ("opentelemetry-distro", "opentelemetry-instrumentation"),
        command=("opentelemetry-instrument", "python"),
        env={f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")},
        check="'opentelemetry.sdk' in sys.modules",
        slow=True,
    ),
    DDTRACE,
)
EVERY = (CLEAN, CLEAN_AGAIN, OFF, ARMED, *PEERS)


def main() -> None:
    parser = argparse.ArgumentParser(description="What agentlightning costs a Python that starts, beside its peers.")
    parser.add_argument("--rounds", type=int, help=f"of every start that is not slow (default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds; leaves {RESULTS.name} alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same there")
    options = parser.parse_args()
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    json_file = options.json and options.json.absolute()
    command = f"python -m benchmarks.startup --rounds {rounds}{' --quick' if options.quick else ''}"

    busy = BusyMeter()
    sections = measure(rounds, counts=1 if options.quick else 3)
    report = Report(command, {**describe_machine(), "busy with something else": busy.share_of_others()}, sections)

    sys.stdout.write(report.as_text())
    if json_file:
        json_file.write_text(json.dumps(report.as_data(), indent=2) + "\n")
    if options.quick:
        say(f"{RESULTS.name} is left as it is: this was a quick run")
    else:
        RESULTS.write_text(report.as_markdown())


def measure(rounds: int, counts: int) -> list[Section]:
    """Everything, in environments that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        # `python -c` and `python -m` look for modules here first: in an empty folder, not in the checkout.
        (Path(folder) / "empty").mkdir()
        os.chdir(Path(folder) / "empty")
        bench = Bench(Path(folder))
        bench.prepare()
        sections = [
            *counted_starts(bench, counts),
            *timed_starts(bench, rounds),
            lookups(bench, rounds),
            *imports(bench, rounds, counts),
            help_command(bench, rounds),
        ]
        os.chdir(CHECKOUT)
    return sections


# What is measured -----------------------------------------------------------------------------------------------------


def counted_starts(bench: Bench, counts: int) -> list[Section]:
    """Row 1: the instructions of `python -c pass`, which tell a difference of a thousandth on any machine."""
    if not bench.can_count():
        return [Section("python -c pass, instructions counted", skipped="skipped: valgrind is not there")]
    say("counting the instructions of python -c pass")
    quick = [configuration for configuration in EVERY if not configuration.slow]
    measured = {
        configuration: [bench.count(configuration, *PASS) for _ in range(counts)]
        for configuration in quick
        if configuration not in bench.failures
    }
    targets = {OFF: 1.015, ARMED: 1.045}
    return [
        Section(
            "python -c pass, instructions counted",
            "millions",
            "By cachegrind, with PYTHONHASHSEED=0; what the kernel does is not in it.",
            bench.rows(quick, measured, CLEAN, targets),
        )
    ]


def timed_starts(bench: Bench, rounds: int) -> list[Section]:
    """Row 2: the same by the clock, from asking for the process to its end.

    One start of each in every round, in another order each time, so that a machine that slows down slows all of them.
    Slow ones have rounds of their own, with a clean start among them: they would push what the others need out of
    the processor's caches.
    """
    sections = []
    for title, chosen, times in (
        ("python -c pass, timed", [c for c in EVERY if not c.slow], rounds),
        ("python -c pass, timed: slower peers", [CLEAN, *(c for c in EVERY if c.slow)], max(rounds // 20, 3)),
    ):
        measured = bench.time_interleaved({c: bench.command(c, *PASS) for c in chosen}, times, title)
        rows = bench.rows(chosen, measured, CLEAN, {OFF: 1.025, ARMED: 1.065})
        sections.append(Section(title, "ms", "From asking for the process to its end; interleaved.", rows))
    return sections


def lookups(bench: Bench, rounds: int) -> Section:
    """Row 3: `find_spec` for a module that nobody has asked to hear of, to a finder that only looks it up in a dict.

    That is what an armed process pays for every other import. Each finder is timed in a process of its own, made as
    its package makes it, in turns with the lookup, and compared with the lookup of that process. The name is one that
    no finder finds: ddtrace's asks all others for every name, and so has a search of `sys.path` in its time.
    """
    rows = []
    for configuration, package in ((ARMED, OURS), (WRAPT, "wrapt"), (NEWRELIC, "newrelic"), (DDTRACE, "ddtrace")):
        say(f"timing find_spec: {configuration.label}")
        if configuration in bench.failures:
            rows.append(Row(bench.label(configuration), note=bench.failures[configuration]))
            continue
        output = bench.output(configuration, "-c", LOOKUP_PROGRAM, package, str(min(max(rounds // 10, 5), 50)))
        timed = json.loads(output.splitlines()[-1])
        if configuration is ARMED:
            rows.append(Row("one dictionary lookup", Summary.of(timed["floor"]), 1.0))
        ratio = median_ratio(timed["finder"], timed["floor"])
        target = 1.2 if configuration is ARMED else None
        rows.append(Row(bench.label(configuration), Summary.of(timed["finder"]), ratio, target))
    return Section("find_spec of a module without a hook", "ns", "To a lookup timed in the same process.", rows)


LOOKUP_PROGRAM = """
import json, sys, timeit

class Floor:
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in names:
            return None

names = {"vllm": []}
package, rounds = sys.argv[1], int(sys.argv[2])
[finder] = [f for f in sys.meta_path if type(f).__module__.split(".")[0] == package]
finders = {"floor": Floor(), "finder": finder}
statement = "finder.find_spec('no_such_module', None, None)"
timers = {name: timeit.Timer(statement, globals={"finder": finder}) for name, finder in finders.items()}
once = timers["finder"].timeit(100) / 100
number = max(int(0.01 / once), 100)
timed = {name: [] for name in finders}
for _ in range(rounds):
    for name, timer in timers.items():
        timed[name].append(timer.timeit(number) / number * 1e9)
print(json.dumps(timed))
"""


def imports(bench: Bench, rounds: int, counts: int) -> list[Section]:
    """Row 4: importing modules while armed, to importing them with no finder.

    The modules have one line each and are in the first folder of `sys.path`: no import is shorter, so the finder's
    share is as large as it gets.
    """
    modules = bench.folder / "modules"
    modules.mkdir()
    for number in range(MODULES):
        (modules / f"generated_{number}.py").write_text("VALUE = 1\n")
    bench.output(OFF, "-c", IMPORT_PROGRAM, str(modules), str(MODULES))  # writes the bytecode
    return [counted_imports(bench, modules, counts), timed_imports(bench, modules, rounds)]


def counted_imports(bench: Bench, modules: Path, counts: int) -> Section:
    """In processes that are armed, and off; without the instructions of such a process that imports none of them."""
    title = f"importing {MODULES} modules, instructions counted"
    if not bench.can_count():
        return Section(title, skipped="skipped: valgrind is not there")
    say(title)

    def count(configuration: Configuration, how_many: int) -> float:
        return bench.count(configuration, "-c", IMPORT_PROGRAM, str(modules), str(how_many))

    counted = {
        configuration: [count(configuration, MODULES) - count(configuration, 0) for _ in range(counts)]
        for configuration in (OFF, ARMED)
    }
    about = "Those of a process that imports none of them are taken off."
    return Section(title, "millions", about, bench.rows(counted, counted, OFF, {ARMED: 1.02}))


IMPORT_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
for number in range(int(sys.argv[2])):
    __import__(f"generated_{number}")
"""


def timed_imports(bench: Bench, modules: Path, rounds: int) -> Section:
    """In armed processes, which take the finder off and put it back.

    Each module is imported with the finder, and twice without it, in another order each time, and then the next one:
    a finder costs so little that between two processes the noise is larger. A run is the sum over all modules.
    """
    title = f"importing {MODULES} modules, timed"
    passes = max(rounds // 60, 2)
    processes = max(rounds // 60, 2)
    say(f"{title}: {passes} passes in each of {processes} processes")
    times: dict[str, list[float]] = {}
    for _ in range(processes):
        output = bench.output(ARMED, "-c", TIMED_IMPORT_PROGRAM, str(modules), str(MODULES), str(passes), OURS)
        for name, values in json.loads(output).items():
            times.setdefault(name, []).extend(values)
    rows = [
        Row("no finder", Summary.of(times["none"]), 1.0),
        Row("no finder, again", Summary.of(times["again"]), median_ratio(times["again"], times["none"])),
        Row(bench.label(ARMED), Summary.of(times["armed"]), median_ratio(times["armed"], times["none"]), 1.02),
    ]
    return Section(title, "ms", "In the same processes, module by module with the finder and without it.", rows)


TIMED_IMPORT_PROGRAM = """
import json, random, sys, time
folder, how_many, passes, package = sys.argv[1:]
sys.path.insert(0, folder)
names = [f"generated_{number}" for number in range(int(how_many))]
[finder] = [f for f in sys.meta_path if type(f).__module__.split(".")[0] == package]
without = [f for f in sys.meta_path if f is not finder]
meta_paths = {"none": without, "again": without, "armed": [finder, *without]}
kinds = list(meta_paths)

def one_pass():
    spent = dict.fromkeys(kinds, 0)
    for name in names:
        random.shuffle(kinds)
        for kind in kinds:
            sys.meta_path[:] = meta_paths[kind]
            started = time.perf_counter_ns()
            __import__(name)
            spent[kind] += time.perf_counter_ns() - started
            del sys.modules[name]
    return spent

one_pass()
done = [one_pass() for _ in range(int(passes))]
print(json.dumps({kind: [spent[kind] / 1e6 for spent in done] for kind in kinds}))
"""


def help_command(bench: Bench, rounds: int) -> Section:
    """Row 5: how long somebody who types `agl --help` waits, to a Python in that environment that does nothing."""
    command = Configuration("agl --help", OURS, (OURS,), command=("agl",))
    nothing = Configuration("python -c pass", OURS, (OURS,))
    commands = {nothing: bench.command(nothing, *PASS), command: bench.command(command, "--help")}
    measured = bench.time_interleaved(commands, max(rounds // 2, 5), "agl --help, timed")
    return Section("agl --help, timed", "ms", "", bench.rows(commands, measured, nothing, {command: 2.5}))


# How it is measured ---------------------------------------------------------------------------------------------------


class Bench:
    """The environments, in a folder, and the processes that are started in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: dict[Configuration, str] = {}
        """The peers that could not be measured, and why: in words that hold on any machine."""
        self._valgrind = shutil.which("valgrind")
        # Numbers, so that every path is as long as the others: a longer one takes instructions of its own.
        names = dict.fromkeys(configuration.venv for configuration in EVERY)
        self._venvs = {name: folder / f"venv{number:02}" for number, name in enumerate(names)}

    def prepare(self) -> None:
        """Make every environment, and start each configuration once: that writes bytecode, and shows that it works."""
        wheel = self._build_wheel()
        first_of_venv = {configuration.venv: configuration for configuration in reversed(EVERY)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = {name: pool.submit(self._make, first, wheel) for name, first in first_of_venv.items()}
        for configuration in EVERY:
            failure = made[configuration.venv].result() or self._start_once(configuration)
            if failure:
                self._fail(configuration, failure)

    def _build_wheel(self) -> Path:
        say("building the wheel")
        self._pip("wheel", "--no-deps", "--wheel-dir", str(self.folder / "wheel"), str(CHECKOUT))
        [wheel] = (self.folder / "wheel").iterdir()
        return wheel

    def _make(self, configuration: Configuration, wheel: Path) -> str:
        """Returns why it could not be made."""
        say(f"making the environment {configuration.venv}")
        venv = self._venvs[configuration.venv]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], env=without_python(), check=True)
        requires = [str(wheel) if requirement == OURS else requirement for requirement in configuration.requires]
        try:
            if requires:
                self._pip("--python", str(venv), "install", *requires)
        except subprocess.CalledProcessError:
            return "could not be installed"
        if configuration.sitecustomize:
            (self._site_packages(configuration) / "sitecustomize.py").write_text(configuration.sitecustomize)
        return ""

    def _pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
        pip = subprocess.run(command, env=without_python(), check=False, capture_output=True, text=True)
        if pip.returncode:
            say(f"pip {arguments[0]} failed: {pip.stderr.strip()[-1000:]}")
        pip.check_returncode()

    def _start_once(self, configuration: Configuration) -> str:
        """Returns why it does not start as it should."""
        check = f"import sys; sys.exit(0 if ({configuration.check}) else 'the check is false')"
        try:
            self.output(configuration, *PASS)
            self.output(configuration, "-c", check)
        except subprocess.CalledProcessError as error:
            say(f"{configuration.label}: {error.stderr.strip()[-1000:]}")
            return "installed, but did not start as it should"
        return ""

    def _fail(self, configuration: Configuration, why: str) -> None:
        if configuration not in PEERS:
            sys.exit(f"startup: {configuration.label}: {why}")
        self.failures[configuration] = why

    def label(self, configuration: Configuration) -> str:
        """What the tables call it, with the version that was installed."""
        if configuration not in EVERY or not configuration.requires or configuration in self.failures:
            return configuration.label
        found = distributions(name=configuration.requires[0], path=[str(self._site_packages(configuration))])
        name, comma, rest = configuration.label.partition(",")
        return f"{name} {next(iter(found)).version}{comma}{rest}"

    def _site_packages(self, configuration: Configuration) -> Path:
        [site_packages] = self._venvs[configuration.venv].glob("lib/python*/site-packages")
        return site_packages

    def command(self, configuration: Configuration, *arguments: str) -> list[str]:
        scripts = self._venvs[configuration.venv] / "bin"
        parts = [str(scripts / part) if (scripts / part).exists() else part for part in configuration.command]
        return [*parts, *arguments]

    def env(self, configuration: Configuration) -> dict[str, str]:
        scripts = self._venvs[configuration.venv] / "bin"
        bare = {"PATH": f"{scripts}:/usr/bin:/bin", "HOME": str(self.folder), "LANG": "C.UTF-8"}
        return {**bare, **configuration.env}

    def output(self, configuration: Configuration, *arguments: str) -> str:
        """What a process of this configuration prints."""
        command = self.command(configuration, *arguments)
        env = self.env(configuration)
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120).stdout

    def can_count(self) -> bool:
        return self._valgrind is not None

    def count(self, configuration: Configuration, *arguments: str) -> float:
        """Millions of instructions of one process, all of them in user space."""
        assert self._valgrind
        cachegrind = [self._valgrind, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = [*cachegrind, *self.command(configuration, *arguments)]
        env = {**self.env(configuration), "PYTHONHASHSEED": "0"}
        log = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=300).stderr
        counted = re.search(r"I\s+refs:\s+([\d,]+)", log)
        if counted is None:
            sys.exit(f"startup: valgrind does not say how many instructions it has counted:\n{log}")
        return int(counted[1].replace(",", "")) / 1e6

    def time_interleaved(
        self, commands: Mapping[Configuration, list[str]], rounds: int, what: str
    ) -> dict[Configuration, list[float]]:
        """Milliseconds of whole processes; a peer that fails on the way is a failure from there on."""
        times: dict[Configuration, list[float]] = {configuration: [] for configuration in commands}
        environments = {configuration: self.env(configuration) for configuration in commands}
        for configuration in interleaved(list(commands), rounds, what):
            if configuration in self.failures:
                continue
            milliseconds, status = time_process(commands[configuration], environments[configuration])
            times[configuration].append(milliseconds)
            if status:
                self._fail(configuration, f"ended with status {status} in one of the runs")
        return {configuration: each for configuration, each in times.items() if configuration not in self.failures}

    def rows(
        self,
        configurations: Sequence[Configuration] | Mapping[Configuration, object],
        measured: Mapping[Configuration, Sequence[float]],
        reference: Configuration,
        targets: Mapping[Configuration, float],
    ) -> list[Row]:
        """A row for each, in this order, with its ratio to the reference."""
        rows = []
        for configuration in configurations:
            label, values = self.label(configuration), measured.get(configuration)
            if values is None:
                rows.append(Row(label, target=targets.get(configuration), note=self.failures[configuration]))
            else:
                ratio = median_ratio(values, measured[reference])
                rows.append(Row(label, Summary.of(values), ratio, targets.get(configuration)))
        return rows


def interleaved(configurations: Sequence[Configuration], rounds: int, what: str) -> list[Configuration]:
    """Each of them once a round, in another order each time, the same on every machine."""
    say(f"{what}: {rounds} rounds of {len(configurations)}")
    shuffle = random.Random(0).shuffle
    order: list[Configuration] = []
    for _ in range(rounds):
        this_round = list(configurations)
        shuffle(this_round)
        order += this_round
    return order


def time_process(command: list[str], env: Mapping[str, str]) -> tuple[float, int]:
    """Milliseconds from asking for the process to its end, and its status; what it prints is thrown away."""
    nowhere = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, env, file_actions=nowhere)
    _, status = os.waitpid(process, 0)
    return (time.perf_counter() - started) * 1e3, status


def without_python() -> dict[str, str]:
    """This process's environment, for pip and venv, without what changes how Python starts or writes bytecode."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AGL_"))}


def describe_machine() -> dict[str, str]:
    """Enough to repeat it by, and nothing that names this very machine."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


class BusyMeter:
    """How much of the machine others have taken since this was made: what is measured meanwhile is worth less."""

    def __init__(self) -> None:
        self._elapsed, self._busy, self._own = self._read()

    def share_of_others(self) -> str:
        elapsed, busy, own = self._read()
        others = (busy - self._busy) - (own - self._own)
        return f"{max(others, 0) / (elapsed - self._elapsed) / (os.cpu_count() or 1):.0%} of the time"

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processors, and of this process with the ended ones that it has started."""
        _, user, nice, system, _, _, interrupts, soft, stolen, *_ = Path("/proc/stat").read_text().split(maxsplit=10)
        busy = sum(map(int, (user, nice, system, interrupts, soft, stolen))) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def say(text: str) -> None:
    sys.stderr.write(f"startup: {text}\n")
    sys.stderr.flush()


# What is reported -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Many measurements of one thing."""

    median: float
    quartiles: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) == 1:
            return cls(values[0], (values[0], values[0]), 1)
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, (first, third), len(values))


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """The median of the ratios within each round.

    Both were measured right after each other, so a machine that is faster or slower for a while cancels out; in the
    ratio of two medians it does not.
    """
    return statistics.median(value / reference for value, reference in zip(values, references, strict=True))


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    summary: Summary | None = None
    ratio: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """None if there is no target, or nothing was measured."""
        return self.ratio <= self.target if self.ratio is not None and self.target is not None else None

    def cells(self, unit: str) -> list[str]:
        target = f"{self.target:.3f}" if self.target else ""
        if self.summary is None or self.ratio is None:
            return [self.label, "", "", "", "", target, ""]
        # Counted instructions are the same each time: quartiles would only repeat them.
        spread = "" if unit == "millions" else "{:.2f} - {:.2f}".format(*self.summary.quartiles)
        reached = {None: "", True: "yes", False: "MISSED"}[self.reached]
        middle = f"{self.summary.median:.3f}" if unit == "millions" else f"{self.summary.median:.2f}"
        return [self.label, middle, spread, str(self.summary.runs), f"{self.ratio:.3f}", target, reached]


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    unit: str = ""
    about: str = ""
    rows: Sequence[Row] = ()
    skipped: str = ""

    @property
    def header(self) -> list[str]:
        return ["", self.unit, "quartiles", "runs", "ratio", "target", "reached"]

    @property
    def notes(self) -> list[str]:
        notes = [f"{row.label}: not measured: {row.note}" for row in self.rows if row.note]
        return [self.skipped, *notes] if self.skipped else notes


RATIO = (
    "A ratio is to the first line of its table, or as it says there: the median of the ratios within each round. "
    "A target is the most that it should be."
)


@dataclass(frozen=True)
class Report:
    """Everything that is printed and written."""

    command: str
    machine: Mapping[str, str]
    sections: Sequence[Section]

    def as_text(self) -> str:
        lines = [f"$ {self.command}", *(f"{name}: {value}" for name, value in self.machine.items())]
        tables = {section.title: [row.cells(section.unit) for row in section.rows] for section in self.sections}
        every_line = [cells for section in self.sections for cells in (section.header, *tables[section.title])]
        widths = [max(map(len, column)) for column in zip(*every_line, strict=True)]
        for section in self.sections:
            lines += ["", *textwrap.wrap(f"{section.title}. {section.about}", WIDTH)]
            lines += [in_columns(cells, widths) for cells in (section.header, *tables[section.title]) if section.rows]
            lines += [wrapped for note in section.notes for wrapped in textwrap.wrap(note, WIDTH)]
        lines += ["", *textwrap.wrap(RATIO, WIDTH), self.verdict()]
        return "".join(f"{line.rstrip()}\n" for line in lines)

    def as_markdown(self) -> str:
        lines = ["# What it costs", ""]
        lines += ["Written by the command below; run it to have it written again.", ""]
        lines += ["```bash", self.command, "```", ""]
        lines += [f"- {name}: {value}" for name, value in self.machine.items()]
        lines += ["", RATIO, self.verdict()]
        for section in self.sections:
            lines += ["", f"## {section.title}", ""]
            lines += [section.about, ""] if section.about else []
            if section.rows:
                lines += [in_markdown(section.header), "|---|" + "---:|" * (len(section.header) - 1)]
                lines += [in_markdown(row.cells(section.unit)) for row in section.rows]
            lines += [line for note in section.notes for line in ("", note)]
        return "".join(f"{line}\n" for line in lines)

    def as_data(self) -> dict[str, object]:
        return {
            "command": self.command,
            "machine": dict(self.machine),
            "sections": [
                {
                    "title": section.title,
                    "unit": section.unit,
                    "about": section.about,
                    "rows": [row_as_data(row) for row in section.rows],
                    "notes": section.notes,
                }
                for section in self.sections
            ],
        }

    def verdict(self) -> str:
        aimed = [row for section in self.sections for row in section.rows if row.target]
        reached = sum(1 for row in aimed if row.reached)
        skipped = sum(1 for section in self.sections if section.skipped)
        return f"{reached} of {len(aimed)} targets reached{f'; {skipped} tables skipped' if skipped else ''}."


def in_columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if number == 0 else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others])


def in_markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row_as_data(row: Row) -> dict[str, object]:
    summary = row.summary
    return {
        "label": row.label,
        "median": summary and summary.median,
        "quartiles": summary and list(summary.quartiles),
        "runs": summary and summary.runs,
        "ratio": row.ratio,
        "target": row.target,
        "reached": row.reached,
        "note": row.note,
    }


if __name__ == "__main__":
    main()
