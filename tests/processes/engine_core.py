"""Find the engine core among the processes of a server."""

from __future__ import annotations

import psutil

from tests.common.vllm import RemoteOpenAIServer


def engine_core(server: RemoteOpenAIServer) -> psutil.Process:
    """Return the engine core's process."""
    [core] = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.name() == "VLLM::EngineCore"
    ]
    return core
