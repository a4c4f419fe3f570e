"""Fresh virtual environments, one for each peer, and the processes that are started in them."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import TypeVar

from benchmarks.configurations import EVERY, OURS, PEERS, Configuration
from benchmarks.report import Row, Target, say

T = TypeVar("T")

CHECKOUT = Path(__file__).parents[1]
PASS = ("-c", "pass")


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
            sys.exit(f"{configuration.label}: {why}")
        self.failures[configuration] = why

    def label(self, configuration: Configuration) -> str:
        """Its name in the tables, with the version that was installed."""
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
        """Return what a process of this configuration prints."""
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
            sys.exit(f"valgrind does not say how many instructions it has counted:\n{log}")
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
            label = self.label(configuration)
            target = Target(targets[configuration]) if configuration in targets else None
            if configuration in measured:
                rows.append(Row.of(label, measured[configuration], measured[reference], target))
            else:
                rows.append(Row(label, target=target, note=self.failures[configuration]))
        return rows


def interleaved(kinds: Sequence[T], rounds: int, what: str) -> list[T]:
    """Each of them once a round, in another order each time, the same on every machine."""
    say(f"{what}: {rounds} rounds of {len(kinds)}")
    shuffle = random.Random(0).shuffle
    order: list[T] = []
    for _ in range(rounds):
        this_round = list(kinds)
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
