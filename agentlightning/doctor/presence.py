"""Is there a vLLM at all."""

from __future__ import annotations

import sys

from agentlightning.importhook import locate

__all__ = ["CLI_MODULE", "what_is_missing"]

CLI_MODULE = "vllm.entrypoints.cli.main"


def what_is_missing() -> str | None:
    """One sentence where this interpreter has no vLLM that could run. Imports nothing of vLLM's."""
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
