"""From waiting for vLLM to patching it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from agentlightning import importhook, is_on, tripwire


def start() -> None:
    """Arm this interpreter if `AGL_INSTRUMENT` asks for it: a vLLM that is imported, or has been, is patched.

    Idempotent: vLLM calls it as a plugin, armed or not. Raises nothing: what goes wrong is one line on stderr.
    """
    try:
        if is_on():
            importhook.take_place_of(tripwire)
            # Once: what follows vLLM from then on is the instrumentation's own, and goes when that is taken back.
            importhook.when_imported("vllm", instrument, once=True)
    except BaseException as error:
        _say(f"not armed: {error!r}")


def execute_vllm(spec: ModuleSpec, module: ModuleType) -> None:
    """Execute a vLLM that the tripwire has found, in the way of the import hook, which follows it from now on."""
    importhook.execute(spec, module, start)


def instrument(vllm: ModuleType) -> None:
    """Patch the vLLM that has just been imported; the import hook that calls this contains and logs what fails."""
    from agentlightning import settings

    if settings.instrument() != "off":
        from agentlightning.instrumentation import arm_all

        arm_all()


def _say(message: str) -> None:
    try:
        sys.stderr.write(f"agentlightning: {' '.join(message.split())}\n")
    except Exception:
        return  # No stderr, or none that can be written to: there is nobody to tell.
