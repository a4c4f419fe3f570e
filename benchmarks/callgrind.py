"""Instructions of a process, counted by valgrind's callgrind, from one moment to another."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["Callgrind", "missing"]


def missing() -> str:
    """Return why nothing can be counted here; an empty text if it can."""
    return "" if shutil.which("valgrind") else "valgrind is not there"


class Callgrind:
    """One process, in whose user space instructions are counted, in all threads.

    Args:
        folder: for callgrind's files; of this process alone.

    Attributes:
        prefix: the beginning of the command that starts the process. Those that it starts run without valgrind.
        pid: set it once the process is there.
    """

    def __init__(self, folder: Path) -> None:
        self._out = folder / "counts"
        self.prefix = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={self._out}"]
        self.pid = 0

    def begin(self) -> None:
        """Count from now on: until then the process is faster."""
        self._control("--instr=on")

    def zero(self) -> None:
        self._control("--zero")

    def millions(self) -> float:
        """Return the millions of instructions since `zero`."""
        self._control("--dump")
        [dump] = self._out.parent.glob(f"{self._out.name}.*")
        counted = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(), re.MULTILINE)
        dump.unlink()
        if counted is None:
            raise RuntimeError("callgrind does not say how many instructions it has counted")
        return int(counted[1]) / 1e6

    def _control(self, what: str) -> None:
        subprocess.run(["callgrind_control", what, str(self.pid)], check=True, capture_output=True, timeout=600)
