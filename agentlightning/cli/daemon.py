"""Run a server in the background, and stop it again, by its pid file."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from agentlightning.cli import interruption

__all__ = ["start", "stop"]

PID_BYTES = 16
SECONDS_TO_STOP = 20.0
SECONDS_TO_LOOK = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start(prog: str, pid_file: Path, run: Callable[[Callable[[str], None]], int]) -> int:
    """Run a server in a process of its own; return an exit status once the server answers or has ended.

    The server's output goes to the file beside the pid file whose name ends in `.log`.

    Args:
        run: the server. It gets a function to call once it answers, with the text to print on stdout, and returns its
            exit status when it ends.
    """
    log = pid_file.with_suffix(".log")
    if log == pid_file:
        return _refuse(prog, pid_file)
    try:
        # O_NOFOLLOW: in a folder that several users share, a link might lead to a file that must not be overwritten.
        lock = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        sys.stderr.write(f"{prog}: cannot write {error.filename}: {error.strerror}\n")
        return 1
    if not _try_lock(lock):
        sys.stderr.write(f"{prog}: already running ({pid_file}); stop it with --stop\n")
        return 1
    if not _is_pid_file(lock):
        return _refuse(prog, pid_file)
    begins = os.fstat(output).st_size
    reading, writing = os.pipe()
    # Until both processes are ready for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if not pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(reading)
        _detach(output)
        # This process keeps the lock until it ends, for whatever reason.
        os._exit(run(lambda text: _send(writing, text)))
    os.ftruncate(lock, 0)
    os.write(lock, f"{pid}\n".encode())
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe, interruption.unwinding():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            announcement = pipe.read()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.unlink(pid_file)
        raise
    if not announcement:
        os.unlink(pid_file)
        sys.stderr.write(log.read_bytes()[begins:].decode("utf-8", "replace"))
        return 1
    sys.stdout.write(announcement)
    return 0


def stop(prog: str, pid_file: Path) -> int:
    """Stop the server of a pid file and wait until it has ended; return the exit status."""
    try:
        lock = os.open(pid_file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        sys.stderr.write(f"{prog}: not running: there is no {pid_file}\n")
        return 1
    if not _is_pid_file(lock):
        return _refuse(prog, pid_file)
    if _try_lock(lock):
        # The server was killed. Its process id may belong to another process now.
        os.unlink(pid_file)
        sys.stderr.write(f"{prog}: not running any more: it has ended and left {pid_file}, which is removed now\n")
        return 1
    pid = int(os.pread(lock, PID_BYTES, 0) or 0)
    if pid:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while not _try_lock(lock):
        if time.monotonic() > deadline:
            sys.stderr.write(
                f"{prog}: process {pid} got SIGTERM {SECONDS_TO_STOP:.0f} s ago and is still running; see its log\n"
            )
            return 1
        time.sleep(SECONDS_TO_LOOK)
    os.unlink(pid_file)
    return 0


def _is_pid_file(lock: int) -> bool:
    """Tell whether the file is empty or holds a process id. Any other content means that it is another file."""
    found = os.pread(lock, PID_BYTES + 1, 0)
    return not found or (len(found) <= PID_BYTES and found.endswith(b"\n") and found[:-1].isdigit())


def _refuse(prog: str, pid_file: Path) -> int:
    sys.stderr.write(f"{prog}: {pid_file} is not a pid file; give --pid-file a pid file or a new name\n")
    return 1


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _detach(output: int) -> None:
    """Leave the terminal, and send all output to the log."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (output, 1), (output, 2)):
        os.dup2(old, new)


def _send(pipe: int, text: str) -> None:
    os.write(pipe, text.encode())
    os.close(pipe)
