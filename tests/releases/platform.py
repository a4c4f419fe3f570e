"""vLLM's CPU platform as a plugin, with the V1 engine in the one release whose CPU platform has only V0: 0.8.5."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


def chosen() -> str:
    """Return the name of the class, which vLLM asks the entry point for."""
    return f"{__name__}.{Platform.__name__}"


class Platform(CpuPlatform):
    """On the machines that 0.8.5 is used on, those with GPUs, V1 is its default."""

    @classmethod
    def supports_v1(cls, model_config: object) -> bool:
        return True
