"""The end of a command by Ctrl-C or SIGTERM: one line on stderr, then death by that signal, as shells expect.

A shell shows 130 or 143, and a script that runs the command in a loop ends with it. Python's own way is a traceback,
and an exception that the import of a compiled module, or a destructor, may swallow.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "end", "install", "unwinding"]

STDERR = 2
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupted(KeyboardInterrupt):
    """A signal has come, and what the command has begun must be undone.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _State:
    line = "agl: interrupted"
    must_unwind = False


def install(prog: str, word: str = "interrupted") -> None:
    """End this process at once when Ctrl-C or SIGTERM comes, whatever it is doing then.

    A signal that is ignored, as in a shell's background job, stays ignored. May be repeated, to change the line.

    Args:
        prog: the name of the command, which begins the line.
        word: what has happened to it.
    """
    _State.line = f"{prog}: {word}"
    for number, default in DEFAULTS.items():
        if signal.getsignal(number) == default:
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable


@contextmanager
def unwinding() -> Iterator[None]:
    """Raise `Interrupted` in the block instead, so that it can undo what it has begun. It must import nothing."""
    _State.must_unwind = True
    try:
        yield
    finally:
        _State.must_unwind = False


def end(number: int = signal.SIGINT) -> None:
    """Print the line, and die by the signal."""
    # Not sys.stderr, which may be in the middle of another write. A terminal has just shown "^C".
    start = "\n" if os.isatty(STDERR) else ""
    try:
        os.write(STDERR, f"{start}{_State.line}\n".encode())
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _State.must_unwind:
        raise Interrupted(number)
    end(number)


def _on_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    # A destructor cannot pass the exception on.
    if isinstance(unraisable.exc_value, Interrupted):
        end(unraisable.exc_value.number)
    sys.__unraisablehook__(unraisable)
