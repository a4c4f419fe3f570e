"""A command on a terminal of its own, as a user types it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["CTRL_C", "Terminal", "on_terminal"]

CTRL_C = b"\x03"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal:
    """A terminal in which one command runs.

    Args:
        columns: the width of the terminal.
        env: the command's environment; that of the tests, without our variables, if not given.
        folder: the command's working directory; that of the tests if not given.
    """

    def __init__(
        self,
        command: Sequence[str],
        columns: int = 80,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        variables = {name: value for name, value in (env or os.environ).items() if name not in ("COLUMNS", "LINES")}
        if env is None:
            variables = {name: value for name, value in variables.items() if not name.startswith("AGL_")}
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.chdir(folder or ".")
            os.execvpe(command[0], [*command], variables)
        self.shown = ""

    def read_until(self, text: str | None = None) -> str:
        """Read until the text is shown, or until the command has ended; return all that has been shown."""
        while text is None or text not in self.shown:
            try:
                read = os.read(self._terminal, 65536)
            except OSError:
                # Linux ends it with an error.
                read = b""
            if not read:
                assert text is None, self.shown
                break
            self.shown += ESCAPES.sub("", read.decode("utf-8", "replace")).replace("\r\n", "\n")
        return self.shown

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def wait(self) -> int:
        """Read what is still shown; return the exit status, which is negative after a signal."""
        self.read_until()
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def on_terminal(
    command: Sequence[str], columns: int = 80, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> tuple[str, int]:
    """Run a command on a terminal, as `Terminal` does; return what it shows, and its exit status."""
    terminal = Terminal(command, columns, env, folder)
    status = terminal.wait()
    return terminal.shown, status
