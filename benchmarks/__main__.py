"""`python -m benchmarks [NAME...] [--quick]`: measures and prints; writes RESULTS.md after a full run of everything."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.report import Report, say

BENCHMARKS = ("startup", "serving", "step", "store")
RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What agentlightning costs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; else all of them")
    parser.add_argument("--quick", action="store_true", help="a rough look, in some two minutes each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {' or '.join(sorted(unknown))}")
    names = options.names or BENCHMARKS
    json_file = options.json and options.json.absolute()

    # Imported one by one: what one of them needs, another can be run without.
    parts = [import_module(f"benchmarks.{name}").measure(options.quick) for name in names]
    report = Report(" ".join(["python -m benchmarks", *sys.argv[1:]]), describe_machine(), parts)

    sys.stdout.write(report.as_text())
    if json_file:
        json_file.write_text(json.dumps(report.as_data(), indent=2) + "\n")
    if options.quick or set(names) != set(BENCHMARKS):
        say(f"{RESULTS.name} is left as it is: only a full run of everything writes it")
    else:
        RESULTS.write_text(report.as_markdown())


if __name__ == "__main__":
    main()
