"""The machine that was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Enough to repeat it by, and nothing that names this very machine."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = gpus()
    return {
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        **({"GPU": ", ".join(found)} if found else {}),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def gpus() -> list[str]:
    """The names of NVIDIA's, as its own tool has them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.splitlines() if asked.returncode == 0 else []


class BusyMeter:
    """Measure how much of the machine others take while this one is running: what is measured then is worth less.

    Args:
        descendants: the running processes below this one, which are not others; of ended ones it knows.
    """

    def __init__(self, descendants: Callable[[], Iterable[int]] = tuple) -> None:
        self._descendants = descendants
        self._elapsed = self._others = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        elapsed, others = time.monotonic(), self._seconds_of_others()
        yield
        self._elapsed += time.monotonic() - elapsed
        self._others += self._seconds_of_others() - others

    def share_of_others(self) -> str:
        return f"{max(self._others, 0) / self._elapsed / (os.cpu_count() or 1):.0%}"

    def _seconds_of_others(self) -> float:
        _, user, nice, system, _, _, interrupts, soft, stolen, *_ = Path("/proc/stat").read_text().split(maxsplit=10)
        everyone = sum(map(int, (user, nice, system, interrupts, soft, stolen))) / os.sysconf("SC_CLK_TCK")
        ours = 0.0
        for pid in self._descendants():
            # A process may end while it is looked at.
            with suppress(OSError):
                ours += cpu_seconds(pid) + cpu_seconds_of_ended(pid)
        return everyone - sum(os.times()[:4]) - ours


def cpu_seconds(pid: int) -> float:
    """Return the processor time of one process, in all its threads and in the kernel, without its children.

    From the clock that clock_getcpuclockid(3) names: in nanoseconds, where utime and stime have hundredths of a second.
    """
    return time.clock_gettime(~pid << 3 | 2)


def cpu_seconds_of_ended(pid: int) -> float:
    """Return the processor time of the children of a process that it has waited for, and of theirs in turn."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    user, system = fields.split()[13:15]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
