"""A pytest plugin: ended by a signal, pytest ends its fixtures, and so every server that they have started.

With pytest-xdist, the process that is ended has started none: its workers have. It ends these first, and waits for
their servers, since pytest-xdist itself leaves its workers too little time for that.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import psutil
import pytest

SECONDS = 60.0
"""A safety net: a server that has not ended by then is killed."""


def pytest_sessionstart(session: pytest.Session) -> None:
    has_workers = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    signal.signal(signal.SIGTERM, _end_workers if has_workers else signal.default_int_handler)
    # A shell lets what it starts in the background ignore it, and that goes on to what the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    # Not imported here: most runs do not need it, and it imports the whole server.
    if forking := sys.modules.get("tests.common.forking"):
        forking.end_fork_server()


def _end_workers(number: int, frame: FrameType | None) -> None:
    workers = psutil.Process().children()
    started = [each for worker in workers for each in worker.children(recursive=True)]
    for worker in workers:
        worker.terminate()
    _, left = psutil.wait_procs(started, SECONDS)
    for each in left:
        each.kill()
    signal.default_int_handler(number, frame)
