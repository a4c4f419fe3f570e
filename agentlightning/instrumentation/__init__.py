"""All instrumentations behind one set of verbs; vLLM's is the only one today."""

from __future__ import annotations

from agentlightning.instrumentation import vllm
from agentlightning.instrumentation.vllm import arm_vllm, instrument_vllm, uninstrument_vllm
from agentlightning.patching import Status

__all__ = ["arm_all", "instrument_all", "instrument_vllm", "status", "uninstrument_all", "uninstrument_vllm"]


def instrument_all() -> None:
    """Instrument everything, now or when it is imported. A second call only logs a warning."""
    instrument_vllm()


def arm_all() -> None:
    """Do the same for the `.pth` file: unless a program has called `uninstrument_all`, and without a warning."""
    arm_vllm()


def uninstrument_all() -> None:
    """Undo all patches. Idempotent."""
    uninstrument_vllm()


def status() -> dict[str, Status]:
    """Return each patch set's state by name, with the reason if it is not applied."""
    return vllm.status()
