"""The vLLM of this interpreter: whether it can run, and what becomes of the patches when it is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from agentlightning.importhook import locate

__all__ = ["CLI_MODULE", "missing_vllm", "write_outcome"]

CLI_MODULE = "vllm.entrypoints.cli.main"


def missing_vllm() -> str | None:
    """Return one sentence if this interpreter has no vLLM that could run, else None. Imports nothing of vLLM."""
    vllm = locate("vllm")
    if vllm is None:
        return f"vLLM is not installed for {sys.executable}; install it with: {sys.executable} -m pip install vllm"
    # A folder that an uninstall left behind has no __init__.py, and so no origin.
    if vllm.origin is None or locate(CLI_MODULE) is None:
        where = vllm.origin or ", ".join(vllm.submodule_search_locations or ())
        return (
            f"the vLLM at {where} is incomplete, it cannot run {CLI_MODULE}; install it again with: "
            f"{sys.executable} -m pip install --force-reinstall vllm"
        )
    return None


def write_outcome(file: str) -> None:
    """Import vLLM as a server would, and write to `file`, as JSON, what became of the patches.

    Called in a process of its own, since `agl doctor` must neither import vLLM nor be patched, and must survive
    whatever vLLM does. The outcome is `{"error": ...}` if vLLM cannot be imported.
    """
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
    """Return the class of a finder, which may be a class itself, like those of the standard library."""
    return finder if isinstance(finder, type) else type(finder)
