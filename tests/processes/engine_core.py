"""Which process of a server is its engine core."""

from __future__ import annotations

import psutil

from tests.common.vllm import RemoteOpenAIServer


def engine_core(server: RemoteOpenAIServer) -> psutil.Process:
    """The process of the engine core."""
    [core] = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.name() == "VLLM::EngineCore"
    ]
    return core
