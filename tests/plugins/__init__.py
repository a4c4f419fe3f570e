"""Plugins as users have them in vLLM; these write down everything that vLLM shows them.

`arguments()` and `environment()` put them into a server, and `shown()` reads what they have written: one description
for each call, without what differs from run to run (ids, hashes, times, memory addresses).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.common.environments import CHECKOUT

__all__ = ["CONNECTOR", "LOGITS_PROCESSORS", "OF_LOGPROBS", "arguments", "environment", "is_settled", "shown"]

OF_LOGPROBS = {"logprobs", "new_logprobs"}
"""The attributes that differ while logprobs are recorded (`AGL_LOGPROBS=on`)."""

PACKAGE = __name__
CONNECTOR = {
    "kv_connector": "Connector",
    "kv_connector_module_path": f"{PACKAGE}.connector",
    "kv_role": "kv_both",
}
LOGITS_PROCESSORS = (f"{PACKAGE}.logits_processors:Adapter", f"{PACKAGE}.logits_processors:Batch")


def arguments(release: tuple[int, ...], model_runs: bool = True) -> list[str]:
    """Return the arguments of `vllm serve` that install the plugins which the release supports.

    Args:
        release: such as `(0, 32, 0)`.
        model_runs: whether the worker is vLLM's own; another has no logits.
    """
    found = [f"--scheduler-cls={PACKAGE}.scheduler.Scheduler"]
    if model_runs and release >= (0, 10, 2):
        found += ["--logits-processors", *LOGITS_PROCESSORS]
    if release >= (0, 10, 0):
        found.append(f"--kv-transfer-config={json.dumps(CONNECTOR)}")
    return found


def environment(file: Path) -> dict[str, str]:
    """Return a server's variables: the plugins write to `file`; vLLM finds the stat logger by metadata."""
    return {"PLUGINS_WRITE_TO": str(file), "PYTHONPATH": f"{CHECKOUT}:{Path(__file__).parent / 'installed'}"}


def is_settled(file: Path) -> bool:
    """Tell whether every added request was freed, and reported to the stat logger if there is one."""
    text = file.read_text() if file.exists() else ""
    added, freed, logged = (
        text.count(f'["{who}"')
        for who in ("scheduler: after add_request", "scheduler: _free_request", "stat logger: finished")
    )
    return added == freed and logged in (0, added)


def shown(file: Path, leave_out: Iterable[str] = (), after: int = 0) -> Counter[str]:
    """Count what each plugin was shown.

    Args:
        leave_out: names of attributes whose values do not count.
        after: how many lines of the file to pass over.
    """
    lines = file.read_text().splitlines()[after:]
    return Counter(json.dumps(_without(json.loads(line), set(leave_out)), sort_keys=True) for line in lines)


def _without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {key: "left out" if key in names else _without(item, names) for key, item in value.items()}
    return [_without(item, names) for item in value] if isinstance(value, list) else value
