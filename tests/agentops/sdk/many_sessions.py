"""Run sessions, and print the names of the spans of each, as JSON.

Arguments: the name of this process, the number of sessions, and the number of concurrent ones.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Installed in the SDK's environment, which type checkers do not see.
agentops: Any = importlib.import_module("agentops")
decorators: Any = importlib.import_module("agentops.sdk.decorators")

SPANS = 4


def main(name: str, how_many: str, at_once: str) -> None:
    agentops.init(auto_start_session=False, export_flush_interval=20)
    client = agentops.get_client()
    logged_in = threading.Event()
    while client.get_current_jwt() is None:
        logged_in.wait(0.02)

    def session(number: int) -> tuple[str, list[str]]:
        names = [f"{name}-{number}-{each}" for each in range(SPANS)]
        trace = agentops.start_trace(f"{name}-{number}")
        for each in names:
            decorators.operation(name=each)(lambda: None)()
        agentops.end_trace(trace, "Fail" if number % 5 == 0 else "Success")
        return format(trace.span.context.trace_id, "032x"), names

    with ThreadPoolExecutor(int(at_once)) as threads:
        made = dict(threads.map(session, range(int(how_many))))
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
