"""The machine that was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Enough to repeat it by, and nothing that names this very machine."""
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


class BusyMeter:
    """How much of the machine others have taken since this was made: what is measured meanwhile is worth less."""

    def __init__(self) -> None:
        self._elapsed, self._busy, self._own = self._read()

    def share_of_others(self) -> str:
        elapsed, busy, own = self._read()
        others = (busy - self._busy) - (own - self._own)
        return f"{max(others, 0) / (elapsed - self._elapsed) / (os.cpu_count() or 1):.0%} of the time"

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processors, and of this process with the ended ones that it has started."""
        _, user, nice, system, _, _, interrupts, soft, stolen, *_ = Path("/proc/stat").read_text().split(maxsplit=10)
        busy = sum(map(int, (user, nice, system, interrupts, soft, stolen))) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])
