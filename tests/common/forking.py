"""Fork `agl` from one process that has imported what its commands import: up to a second of CPU less for each start.

Run as a module, this is that process. What it has forked is none of the tests' own children, so it writes each exit
status to a file before it waits for the process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from agentlightning.cli import main as agl
from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl

__all__ = ["ForkedProcess", "end_fork_server", "fork_agl", "run_agl"]

IMPORTED = (
    *("uvicorn", "agentlightning.server", "agentlightning.server.agentops"),
    *("agentlightning.cli.doctor", "agentlightning.cli.export"),
)


class ForkedProcess:
    """A forked `agl`, with the part of the interface of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid = pid
        self._status = status
        self._pidfd = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._pidfd)

    def poll(self) -> int | None:
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        ended, _, _ = select.select([self._pidfd], [], [], timeout)
        if not ended:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        while (status := self.poll()) is None:
            time.sleep(0.001)
        return status

    def send_signal(self, number: int) -> None:
        # By the descriptor, and as `subprocess` does it: it may end at any moment, and its id then be another's.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _ForkServer:
    """The process that forks; started by the first test that needs it, and ended with the tests."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._folder = tempfile.TemporaryDirectory(prefix="agl-forked-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._folder.name],
            env={**without_agl(os.environ), "PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, *files: IO[bytes]) -> ForkedProcess:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [arguments, dict(env), str(folder), *(file.name for file in files)]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pid, number = self._process.stdout.readline().split()
        return ForkedProcess(int(pid), Path(self._folder.name) / number)

    def end(self) -> None:
        if os.getpid() == self.owner:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()


_server: _ForkServer | None = None


def fork_agl(arguments: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
    """Start `agl` with these arguments; it appends what it prints to the log."""
    return _fork_server().fork(arguments, env, Path.cwd(), log, log)


def run_agl(
    *arguments: str | Path, env: Mapping[str, str], folder: Path | None = None, timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """Run `agl` in this folder to its end, and keep its output.

    For what depends on the arguments and on variables that `agl` reads: Python itself has been started without them.
    """
    command = [str(each) for each in arguments]
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = _fork_server().fork(command, env, folder or Path.cwd(), stdout, stderr)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(["agl", *command], status, stdout.read(), stderr.read())


def _fork_server() -> _ForkServer:
    global _server
    # A forked test has none of its own yet, and must not write into its parent's pipe.
    if _server is None or _server.owner != os.getpid():
        _server = _ForkServer()
    return _server


def end_fork_server() -> None:
    """End the process that forks, if this process has started it."""
    if _server is not None:
        _server.end()


def _keep_statuses(files: dict[int, Path]) -> None:
    """Write the status of each child that has ended to a file, whole at once, and reap it."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        file = files.pop(ended.si_pid)
        part = file.with_suffix(".part")
        part.write_text(str(status))
        part.rename(file)
        os.waitpid(ended.si_pid, 0)


def _serve(folder: Path) -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    # No server looks through all of this for garbage again, nor copies it by doing so.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By process; process ids come again, so that the files have numbers of their own.
    files: dict[int, Path] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _keep_statuses(files))
    for number, request in enumerate(iter(sys.stdin.readline, "")):
        arguments, env, cwd, *outputs = json.loads(request)
        # A server may end before it is known here which it is.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            break
        files[pid] = folder / str(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        sys.stdout.write(f"{pid} {number}\n")
        sys.stdout.flush()
    else:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    null = os.open(os.devnull, os.O_RDONLY)
    stdout, stderr = (os.open(output, os.O_WRONLY | os.O_APPEND) for output in outputs)
    for old, new in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(old, new)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv = ["agl", *arguments]
    sys.exit(agl(arguments))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
