"""Run functions as sessions of the AgentOps SDK: one returns, one raises, and one is interrupted."""

from __future__ import annotations

import importlib
import json
import sys
import time
from contextlib import suppress
from typing import Any

# Installed in the SDK's environment, which type checkers do not see.
agentops: Any = importlib.import_module("agentops")
decorators: Any = importlib.import_module("agentops.sdk.decorators")


@decorators.session
def returns() -> int:
    return 1


@decorators.session
def raises() -> None:
    raise ValueError("wrong")


@decorators.session
def is_interrupted() -> None:
    raise KeyboardInterrupt


def main() -> None:
    agentops.init(auto_start_session=False)
    # The SDK records no session before it is logged in.
    while agentops.get_client().get_current_jwt() is None:
        time.sleep(0.05)
    for each in (returns, raises, is_interrupted):
        with suppress(ValueError, KeyboardInterrupt):
            each()
    importlib.import_module("opentelemetry.trace").get_tracer_provider().force_flush()
    sys.stdout.write(f"\n{json.dumps('done')}\n")


if __name__ == "__main__":
    main()
