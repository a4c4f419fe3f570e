"""The end of a server, by a signal or with its engine: the same instrumented or not.

Each end is tried with another command and another way to start the engine core, so that these are tried as well.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence

import httpx
import pytest

from tests.common.vllm import AGL, PLAIN, RemoteOpenAIServer, side_by_side, started_by
from tests.processes.engine_core import engine_core
from tests.processes.every_endpoint import MESSAGES, carried, expected

pytestmark = pytest.mark.tier("all")

PYTHON_M = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")
SECONDS = 60

# How its HTTP server ends: uvicorn's words, compared with the same ones. What vLLM says beside it depends on how quick
# the engine is to end.
SAID = re.compile(r"^INFO: +([A-Z][^\d\n]+)$", re.MULTILINE)


End = Callable[[], None]


def terminate(server: RemoteOpenAIServer) -> End:
    return lambda: server.process.send_signal(signal.SIGTERM)


def interrupt(server: RemoteOpenAIServer) -> End:
    return lambda: server.process.send_signal(signal.SIGINT)


def kill_engine(server: RemoteOpenAIServer) -> End:
    return engine_core(server).kill


@pytest.mark.parametrize(
    ("command", "agl", "start_method", "end", "is_told"),
    [
        pytest.param(PYTHON_M, PYTHON_M, "spawn", terminate, False, id="SIGTERM, python -m, spawn"),
        pytest.param(PLAIN, AGL, "forkserver", interrupt, False, id="SIGINT, agl vllm serve, forkserver"),
        pytest.param(PLAIN, PLAIN, "fork", kill_engine, True, id="killed engine, vllm serve, fork"),
    ],
)
def test_a_server_ends_as_without_us(
    command: Sequence[str],
    agl: Sequence[str],
    start_method: str,
    end: Callable[[RemoteOpenAIServer], End],
    is_told: bool,
) -> None:
    environment = started_by(start_method)
    ours = RemoteOpenAIServer(command=agl, env={**environment, "AGL_INSTRUMENT": "1"})
    vllms = RemoteOpenAIServer(command=command, env=environment)
    with side_by_side(ours, vllms):
        assert carried(ours) == expected()

        assert ended(ours, end(ours), is_told) == ended(vllms, end(vllms), is_told)
        [start] = ours.our_lines
        assert " INFO " in start


def ended(server: RemoteOpenAIServer, end: End, is_told: bool) -> tuple[int, list[str], list[str]]:
    """Return the exit status of a server that ends during a stream, what its client got, and its last log lines.

    Args:
        server: the one that ends.
        end: ends it.
        is_told: whether its client is told; else vLLM waits for the client to leave.
    """
    so_far = len(server.log)
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 900, "ignore_eos": True, "n": 8, "stream": True}
    told = []
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS) as stream:
        lines = stream.iter_lines()
        next(lines)
        end()
        if is_told:
            told = [line for line in lines if line and "chat.completion.chunk" not in line]
    status = server.process.wait(SECONDS)
    return status, told, SAID.findall(server.log[so_far:])
