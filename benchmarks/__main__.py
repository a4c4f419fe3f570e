"""`python -m benchmarks [NAME...] [--quick]`: measures and prints; a full run writes `results/NAME.md`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.report import Report, say
from tools.measurements import update_pages

BENCHMARKS = (
    "startup",
    "counted",
    "serving",
    "step",
    "store",
    "blocks",
    "recording",
    "offline",
    "logprobs",
    "masks",
    "gpu",
    "lightning_store",
    "beyond",
    "scale",
    "page",
    "prune",
    "trajectories",
    "collate",
    "drift",
    "continuation",
)
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What agentlightning costs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; else all of them")
    parser.add_argument("--quick", action="store_true", help="a rough look, in some two minutes each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {' or '.join(sorted(unknown))}")
    json_file = options.json and options.json.absolute()

    reports = []
    for name in options.names or BENCHMARKS:
        # Imported one by one: what one of them needs, another can be run without.
        benchmark = import_module(f"benchmarks.{name}")
        if hasattr(benchmark, "missing") and (missing := benchmark.missing()):
            if options.names:
                sys.exit(f"{name} cannot be measured here: {missing}")
            say(f"{name} is left out: {missing}")
            continue
        part = benchmark.measure(options.quick)
        report = Report(f"python -m benchmarks {name}", describe_machine(), part)
        if options.quick:
            say(f"{RESULTS.name}/{name}.md is left as it is: only a full run writes it")
        else:
            (RESULTS / f"{name}.md").write_text(report.as_markdown())
            # The pages of the documentation show some of these tables.
            update_pages()
        sys.stdout.write(report.as_text())
        reports.append(report.as_data())
    if json_file:
        json_file.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
