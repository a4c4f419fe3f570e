"""How the engine core of a server is started, and which process it is."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.common.vllm import RemoteOpenAIServer

START_METHOD = Path(__file__).parent / "start_method"


def started_by(method: str) -> dict[str, str]:
    """The environment of a server that starts its engine core by spawn, fork or forkserver."""
    return {"PYTHONPATH": str(START_METHOD), "ENGINE_CORE": method}


def engine_core(server: RemoteOpenAIServer) -> psutil.Process:
    """The process of the engine core."""
    [core] = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.name() == "VLLM::EngineCore"
    ]
    return core
