"""The report of `agl drift` on the page that explains it: `python -m tools.drift_report` writes it.

It runs `make demo-rollout`, so that the page has what a reader's own run prints, but for ids and counts.
"""

from __future__ import annotations

import subprocess
import sys
import time

from agentlightning.cli.drift import lines_of
from agentlightning.drift import Report
from agentlightning.store import open_store
from examples.demo_rollout import FILE
from tools.make_env import CHECKOUT

__all__ = ["BEGIN", "END", "PAGE"]

PAGE = CHECKOUT / "docs" / "drift.md"
BEGIN, END = "<!-- written by python -m tools.drift_report -->", "<!-- until here -->"


def main() -> None:
    """Run the demonstration without its page, and write the report."""
    subprocess.run([sys.executable, "-m", "examples.demo_rollout"], check=True, cwd=CHECKOUT, stdin=subprocess.DEVNULL)
    report = Report()
    with open_store(str(FILE), read_only=True) as store:
        for attempt in store.drift():
            report.add(attempt)
    lines = "\n".join(lines_of(report, brief=False))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    told = f"The report of `make demo-rollout`, whose agent is forced to call a tool, on {time.strftime('%Y-%m-%d')}:"
    PAGE.write_text(f"{before}{BEGIN}\n{told}\n\n```text\n{lines}\n```\n\n{END}{after}")


if __name__ == "__main__":
    main()
