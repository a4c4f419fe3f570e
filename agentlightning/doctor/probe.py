"""Import vLLM as a server would, and write to a file what became of the patches.

A process of its own, since `agl doctor` shall neither import vLLM nor be patched, and shall outlive what vLLM does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(file: str) -> None:
    """Write the outcome to `file`, as JSON; `{"error": ...}` where vLLM cannot be imported."""
    try:
        outcome = _outcome()
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    Path(file).write_text(json.dumps(outcome))


def _outcome() -> dict[str, Any]:
    import vllm
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from agentlightning.importhook import finders_ahead
    from agentlightning.instrumentation import vllm as instrumentation

    not_imported = instrumentation.import_targets()
    return {
        "version": vllm.__version__,
        "patches": {name: status.as_dict() for name, status in instrumentation.status().items()},
        "not_imported": not_imported,
        "finders_ahead": [f"{f.__module__}.{f.__qualname__}" for f in map(_class, finders_ahead())],
    }


def _class(finder: object) -> type:
    """A finder may be a class itself, as the standard library's are."""
    return finder if isinstance(finder, type) else type(finder)
