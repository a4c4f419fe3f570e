"""Tests of a test run that is ended: it leaves no server behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.common.environments import CHECKOUT

pytestmark = pytest.mark.tier("all")

SECONDS = 60.0
"""A safety net: all of it takes seconds."""
# Each in a worker of its own, with a server of its own.
TESTS = """
import subprocess, time
import pytest

@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with subprocess.Popen(["sleep", "600"]) as server:
        yield server
        # Longer than pytest-xdist waits for a worker that it interrupts.
        time.sleep(6)
        server.kill()

@pytest.mark.parametrize("number", [1, 2])
def test_that_is_interrupted(server, number):
    open(f"{number}.pid", "w").write(str(server.pid))
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_pytest_ends_the_servers_of_its_tests(workers: int, tmp_path: Path) -> None:
    (tmp_path / "test_interrupted.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.common.ending", "-n", str(workers), "--dist=load"]
    with subprocess.Popen([*command, tmp_path], cwd=tmp_path, env={"PYTHONPATH": str(CHECKOUT)}) as run:
        files = [tmp_path / f"{number}.pid" for number in range(1, max(workers, 1) + 1)]
        end = time.monotonic() + SECONDS
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < end
            time.sleep(0.05)
        servers = [psutil.Process(int(file.read_text())) for file in files]

        run.send_signal(signal.SIGTERM)

        assert run.wait(SECONDS) == pytest.ExitCode.INTERRUPTED
    assert [each.pid for each in servers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
