"""The file that a command writes: it appears once it is complete, and replaces no other unless it may."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["STDOUT", "CannotWrite", "check", "opened"]

STDOUT = "-"


class CannotWrite(Exception):
    """The file cannot be written; the message says why, and what to do."""


def check(name: str, force: bool) -> None:
    """Find what stands in the way of a file, before the work for it begins.

    Args:
        name: the file; `-` is stdout.
        force: replace it if it exists.

    Raises:
        CannotWrite: something does.
    """
    if name == STDOUT:
        return
    path = Path(name).resolve()
    if path.is_dir():
        raise CannotWrite(f"{name} is a folder: give -o a file in it, such as {Path(name) / 'export'}")
    if not path.parent.is_dir():
        raise CannotWrite(f"there is no folder {path.parent}: create it, or give another -o")
    if path.is_file() and not force:
        raise CannotWrite(f"{name} exists: give --force to replace it, or another -o")


@contextmanager
def opened(name: str, force: bool) -> Iterator[IO[bytes]]:
    """Open a file that `check` has passed. It gets its name when the block ends without an error.

    Raises:
        CannotWrite: it cannot be written, or has come into being meanwhile.
    """
    try:
        with _opened(name, force) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotWrite(f"cannot write {'to stdout' if name == STDOUT else name}: {error.strerror}") from error


@contextmanager
def _opened(name: str, force: bool) -> Iterator[IO[bytes]]:
    if name == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        # A pipe or a device cannot be replaced.
        with path.open("wb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            check(name, force)
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
