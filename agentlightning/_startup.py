"""From waiting for vLLM to patching it."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from _agentlightning import is_on
from agentlightning import importhook


def start() -> None:
    """Arm this interpreter if `AGL_INSTRUMENT` asks for it: a vLLM that is imported, or has been, is patched.

    Idempotent: vLLM calls it as a plugin, armed or not. What goes wrong is one line on stderr.

    Raises:
        SystemExit: `AGL_INSTRUMENT=strict`, and this vLLM cannot be patched completely, or not at all.
    """
    try:
        if is_on():
            # Once: what follows vLLM from then on is the instrumentation's own, and goes when that is taken back.
            importhook.when_imported("vllm", instrument, once=True)
    except Exception as error:
        _refuse_if_strict(error)
        _say(f"not armed: {error!r}")


def execute_vllm(spec: ModuleSpec, module: ModuleType) -> None:
    """Execute the vLLM that the finder has waited for, and follow it with the import hook from now on."""
    importhook.execute(spec, module, start)


def instrument(vllm: ModuleType) -> None:
    """Patch the vLLM that has just been imported; the import hook that calls this contains and logs what fails."""
    try:
        from agentlightning import settings

        if settings.instrument() != "off":
            from agentlightning.instrumentation import arm_all

            arm_all()
    except Exception as error:
        _refuse_if_strict(error)
        raise


def _refuse_if_strict(error: Exception) -> None:
    """End the process if strict was asked for: a server that could not be patched must not serve."""
    # Read here, since the module that reads the variables may be what failed.
    if os.environ.get("AGL_INSTRUMENT", "").strip().lower() == "strict":
        raise SystemExit(f"agentlightning: AGL_INSTRUMENT=strict refuses this vLLM: {error!r}") from error


def _say(message: str) -> None:
    try:
        sys.stderr.write(f"agentlightning: {' '.join(message.split())}\n")
    except Exception:
        return  # No stderr, or none that can be written to: there is nobody to tell.
