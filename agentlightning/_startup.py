"""Patch vLLM when this interpreter imports it, or at once if it has; also the entry point of vLLM's plugin."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from _agentlightning import is_on
from agentlightning import importhook


def start() -> None:
    """Arm this interpreter if `AGL_INSTRUMENT` asks for it: patch vLLM when it is imported, or now if it has been.

    Idempotent: vLLM also calls it as a plugin. An error is one line on stderr.

    Raises:
        SystemExit: `AGL_INSTRUMENT=strict`, and this vLLM cannot be patched completely.
    """
    try:
        if is_on():
            # Once: the instrumentation then registers hooks of its own, and removes them when it is undone.
            importhook.when_imported("vllm", instrument, once=True)
    except Exception as error:
        _refuse_if_strict(error)
        _say(f"not armed: {error!r}")


def execute_vllm(spec: ModuleSpec, module: ModuleType) -> None:
    """Execute the vLLM module that the finder has waited for, and hand its imports to the import hook from now on."""
    importhook.execute(spec, module, start)


def instrument(vllm: ModuleType) -> None:
    """Patch the vLLM that has just been imported; the import hook that calls this logs its exceptions."""
    try:
        from agentlightning import settings

        if settings.instrument() != "off":
            from agentlightning.instrumentation import arm_all

            arm_all()
    except Exception as error:
        _refuse_if_strict(error)
        raise


def _refuse_if_strict(error: Exception) -> None:
    """End the process under strict: a server that could not be patched must not serve."""
    # Read here, since importing the settings module may have failed.
    if os.environ.get("AGL_INSTRUMENT", "").strip().lower() == "strict":
        raise SystemExit(f"agentlightning: AGL_INSTRUMENT=strict refuses this vLLM: {error!r}") from error


def _say(message: str) -> None:
    try:
        sys.stderr.write(f"agentlightning: {' '.join(message.split())}\n")
    except Exception:
        return  # stderr is missing or closed: the message has no reader.
