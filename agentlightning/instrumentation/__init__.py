"""What is patched, as one: every instrumentation that there is. vLLM's is the only one today."""

from __future__ import annotations

from agentlightning.instrumentation import vllm
from agentlightning.instrumentation.vllm import arm_vllm, instrument_vllm, uninstrument_vllm
from agentlightning.patching import Status

__all__ = ["arm_all", "instrument_all", "instrument_vllm", "status", "uninstrument_all", "uninstrument_vllm"]


def instrument_all() -> None:
    """Instrument everything, now or when it is imported. A second call is a no-op with a warning."""
    instrument_vllm()


def arm_all() -> None:
    """What the `.pth` file leads to: as `instrument_all`, silent where a program has done it already."""
    arm_vllm()


def uninstrument_all() -> None:
    """Put everything back as it was. Idempotent."""
    uninstrument_vllm()


def status() -> dict[str, Status]:
    """Each patch set's state by name, with the reason where one is not applied."""
    return vllm.status()
