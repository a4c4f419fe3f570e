"""The cost of the `.pth` file and the import hook for every Python of an environment.

Makes fresh virtual environments with this interpreter's Python, one with nothing, one with this checkout's wheel and
one for each of its peers (the newest release on the package index), and compares how they start and import. Nothing
but the standard library runs here; needs pip beside this interpreter and a network. valgrind, where it is there,
counts instructions: those are the same in each run, whatever else the machine does, but leave out what the kernel
does for a process, so time is measured as well.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from benchmarks.configurations import (
    ARMED,
    CLEAN,
    DDTRACE,
    EVERY,
    NEWRELIC,
    OFF,
    OUR_FINDER,
    OURS,
    WRAPT,
    Configuration,
)
from benchmarks.environments import CHECKOUT, PASS, Bench
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say

ROUNDS = 600
QUICK_ROUNDS = 30
MODULES = 500


def measure(quick: bool) -> Part:
    """Everything, in environments that are gone afterwards."""
    rounds, counts = (QUICK_ROUNDS, 1) if quick else (ROUNDS, 3)
    busy = BusyMeter()
    with busy.running(), tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
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
    return Part("The start of a Python process", "", sections, busy.share_of_others())


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
    targets = {OFF: 1.013, ARMED: 1.04}
    return [
        Section(
            "python -c pass, instructions counted",
            "millions",
            "By cachegrind, with hash seed 0; without the kernel. A start reads the names of all that is installed: "
            "those of what agentlightning needs (pydantic, SQLAlchemy, tqdm) count, though vLLM brings most of them.",
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
    for configuration, package in ((ARMED, OUR_FINDER), (WRAPT, "wrapt"), (NEWRELIC, "newrelic"), (DDTRACE, "ddtrace")):
        say(f"timing find_spec: {configuration.label}")
        if configuration in bench.failures:
            rows.append(Row(bench.label(configuration), note=bench.failures[configuration]))
            continue
        output = bench.output(configuration, "-c", LOOKUP_PROGRAM, package, str(min(max(rounds // 10, 5), 50)))
        timed = json.loads(output.splitlines()[-1])
        if configuration is ARMED:
            rows.append(Row.of("one dictionary lookup", timed["floor"], timed["floor"]))
        target = Target(1.2) if configuration is ARMED else None
        rows.append(Row.of(bench.label(configuration), timed["finder"], timed["floor"], target))
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
    """Count instructions in processes that are armed, and off, without those of one that imports none of them."""
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
    about = "Less those of a process that imports none."
    return Section(title, "millions", about, bench.rows(counted, counted, OFF, {ARMED: 1.02}))


IMPORT_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
for number in range(int(sys.argv[2])):
    __import__(f"generated_{number}")
"""


def timed_imports(bench: Bench, modules: Path, rounds: int) -> Section:
    """Count instructions in armed processes, which take the finder off and put it back.

    Each module is imported with the finder, and twice without it, in another order each time, and then the next one:
    a finder costs so little that between two processes the noise is larger. A run is the sum over all modules.
    """
    title = f"importing {MODULES} modules, timed"
    passes = max(rounds // 40, 2)
    processes = max(rounds // 40, 2)
    say(f"{title}: {passes} passes in each of {processes} processes")
    times: dict[str, list[float]] = {}
    for _ in range(processes):
        output = bench.output(ARMED, "-c", TIMED_IMPORT_PROGRAM, str(modules), str(MODULES), str(passes), OUR_FINDER)
        for name, values in json.loads(output).items():
            times.setdefault(name, []).extend(values)
    rows = [
        Row.of("no finder", times["none"], times["none"]),
        Row.of("no finder, again", times["again"], times["none"]),
        Row.of(bench.label(ARMED), times["armed"], times["none"], Target(1.02)),
    ]
    return Section(title, "ms", "Module by module, with the finder and without it.", rows)


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
