"""Plugins that a user may have in vLLM, which write down all that vLLM shows them.

`arguments()` and `environment()` put them into a server, and `shown()` reads what they have written: one description
for each call, without what differs from run to run (ids, hashes, times, memory addresses).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.common.environments import CHECKOUT

__all__ = ["CONNECTOR", "LOGITS_PROCESSORS", "arguments", "environment", "shown"]

PACKAGE = __name__
CONNECTOR = {
    "kv_connector": "Connector",
    "kv_connector_module_path": f"{PACKAGE}.connector",
    "kv_role": "kv_both",
}
LOGITS_PROCESSORS = (f"{PACKAGE}.logits_processors:Adapter", f"{PACKAGE}.logits_processors:Batch")


def arguments(release: tuple[int, ...], model_runs: bool = True) -> list[str]:
    """The arguments of `vllm serve` that put the plugins in, as far as the release has such plugins.

    Args:
        release: such as `(0, 32, 0)`.
        model_runs: whether the worker is vLLM's own; another has neither logits nor a cache.
    """
    found = [f"--scheduler-cls={PACKAGE}.scheduler.Scheduler"]
    if model_runs and release >= (0, 10, 2):
        found += ["--logits-processors", *LOGITS_PROCESSORS]
    if model_runs and release >= (0, 10, 0):
        found.append(f"--kv-transfer-config={json.dumps(CONNECTOR)}")
    return found


def environment(file: Path) -> dict[str, str]:
    """The variables of a server with the plugins, which write to `file`; vLLM finds the stat logger by metadata."""
    return {"PLUGINS_WRITE_TO": str(file), "PYTHONPATH": f"{CHECKOUT}:{Path(__file__).parent / 'installed'}"}


def shown(file: Path, leave_out: Iterable[str] = ()) -> Counter[str]:
    """How often each plugin was shown what.

    Args:
        leave_out: names of attributes whose values do not count.
    """
    lines = file.read_text().splitlines()
    return Counter(json.dumps(_without(json.loads(line), set(leave_out)), sort_keys=True) for line in lines)


def _without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {key: "left out" if key in names else _without(item, names) for key, item in value.items()}
    return [_without(item, names) for item in value] if isinstance(value, list) else value
