"""A server in the background: started until it answers, and found again by its pid file to be ended."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["start", "stop"]

PID_BYTES = 16
SECONDS_TO_STOP = 20.0
SECONDS_TO_LOOK = 0.05


def start(prog: str, pid_file: Path, run: Callable[[Callable[[str], None]], int]) -> int:
    """Run a server in a process of its own; returns an exit status as soon as that is up, or has ended.

    Its output is in the file beside the pid file whose name ends in `.log`.

    Args:
        run: the server, which calls what it is given when it is up, with what is to be said on stdout then; returns
            its exit status when it ends.
    """
    log = pid_file.with_suffix(".log")
    if log == pid_file:
        return _refuse(prog, pid_file)
    try:
        # No links: in a folder of several users, one might lead to a file that is not to be written to.
        lock = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        sys.stderr.write(f"{prog}: {error.filename} cannot be written: {error.strerror}\n")
        return 1
    if not _take(lock):
        sys.stderr.write(f"{prog}: {pid_file} is of one that runs: --stop ends it\n")
        return 1
    if not _is_pid_file(lock):
        return _refuse(prog, pid_file)
    begins = os.fstat(output).st_size
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(told)
        _leave(output)
        # The lock is held for as long as this process is there: whatever ends it.
        os._exit(run(lambda text: _tell(tell, text)))
    os.ftruncate(lock, 0)
    os.write(lock, f"{pid}\n".encode())
    os.close(tell)
    with os.fdopen(told) as pipe:
        said = pipe.read()
    if not said:
        os.unlink(pid_file)
        sys.stderr.write(log.read_bytes()[begins:].decode("utf-8", "replace"))
        return 1
    sys.stdout.write(said)
    return 0


def stop(prog: str, pid_file: Path) -> int:
    """End the server of a pid file, and wait for that; returns the exit status."""
    try:
        lock = os.open(pid_file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        sys.stderr.write(f"{prog}: none is running: there is no {pid_file}\n")
        return 1
    if not _is_pid_file(lock):
        return _refuse(prog, pid_file)
    if _take(lock):
        # Of one that was killed; its process id may be anybody's by now.
        os.unlink(pid_file)
        sys.stderr.write(f"{prog}: none is running any more: {pid_file} was of one that has ended\n")
        return 1
    pid = int(os.pread(lock, PID_BYTES, 0) or 0)
    if pid:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while not _take(lock):
        if time.monotonic() > deadline:
            sys.stderr.write(f"{prog}: process {pid} has been told to end, and has not\n")
            return 1
        time.sleep(SECONDS_TO_LOOK)
    os.unlink(pid_file)
    return 0


def _is_pid_file(lock: int) -> bool:
    """Whether it is empty, or has a process id: what has anything else is somebody's file."""
    found = os.pread(lock, PID_BYTES + 1, 0)
    return not found or (len(found) <= PID_BYTES and found.endswith(b"\n") and found[:-1].isdigit())


def _refuse(prog: str, pid_file: Path) -> int:
    sys.stderr.write(f"{prog}: {pid_file} is no pid file: give --pid-file one that is, or is not there yet\n")
    return 1


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave(output: int) -> None:
    """Belong to no terminal, and write to the log."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (output, 1), (output, 2)):
        os.dup2(old, new)


def _tell(pipe: int, text: str) -> None:
    os.write(pipe, text.encode())
    os.close(pipe)
