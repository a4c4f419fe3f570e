"""Several engines behind one address, or with an address each."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.common.answers import get
from tests.common.vllm import RemoteOpenAIServer, free_port, is_healthy, side_by_side
from tests.processes.every_endpoint import carried, expected

pytestmark = pytest.mark.tier("all")

ARMED = {"AGL_INSTRUMENT": "1"}


def test_every_answer_carries_ids_with_an_engine_elsewhere() -> None:
    meeting_point = ("--data-parallel-address=127.0.0.1", f"--data-parallel-rpc-port={free_port()}")
    two_engines = ("--data-parallel-size=2", "--data-parallel-size-local=1", *meeting_point)
    # Both of its API servers have both engines.
    server = RemoteOpenAIServer(*two_engines, env=ARMED)
    engine = RemoteOpenAIServer(
        *two_engines, "--headless", "--data-parallel-start-rank=1", env=ARMED, is_up=lambda engine: True
    )
    with side_by_side(server, engine):
        whole = expected()
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(carried, [server] * 4)) == [whole] * 4
        assert engines_that_answered(server) == {"0", "1"}
        assert engine.our_lines == []
        [start] = server.our_lines
        assert " INFO " in start


def engines_that_answered(server: RemoteOpenAIServer) -> set[str]:
    metrics = get(server, "/metrics")[1].decode()
    counted = re.findall(r'^vllm:generation_tokens_total\{engine="(\d+)".*\} (\S+)$', metrics, re.MULTILINE)
    return {engine for engine, tokens in counted if float(tokens)}


def test_every_server_of_a_supervisor_answers_with_ids() -> None:
    supervisor_port = free_port()
    first = RemoteOpenAIServer(
        "--data-parallel-multi-port-external-lb",
        "--data-parallel-size=2",
        "--data-parallel-size-local=2",
        f"--data-parallel-supervisor-port={supervisor_port}",
        # vLLM serves no other models in this way, and those not on a CPU: so it is told that a dense one is of experts.
        '--hf-overrides={"num_experts": 4}',
        env=ARMED,
        is_up=lambda server: is_healthy(at(server, supervisor_port)),
    )
    with first:
        assert carried(first) == expected()
        assert carried(at(first, first.port + 1)) == expected()
        # Each is a server of its own.
        assert [" INFO " in line for line in first.our_lines] == [True, True]


def at(server: RemoteOpenAIServer, port: int) -> RemoteOpenAIServer:
    """Return the server of the same processes at another port."""
    other = copy.copy(server)
    other.url = f"http://127.0.0.1:{port}"
    return other
