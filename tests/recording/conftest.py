"""The servers that the tests of recording share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.common.environments import CHECKOUT
from tests.common.tool_loop import with_tool_loop
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

# What is off in vLLM unless it is asked for.
OPTIONAL = ("--enable-prompt-embeds", "--enable-scale-out", "--enable-prompt-tokens-details")


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """A server with a key, whose answers have ids only on request, and two model calls for each response."""
    env = {
        "AGL_RETURN_TOKEN_IDS": "none",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "PYTHONPATH": os.pathsep.join([str(with_tool_loop(tmp_path_factory.mktemp("loop"))), str(CHECKOUT)]),
    }
    arguments = (*OPTIONAL, "--api-key=none", "--middleware=tests.recording.under_way.UnderWay")
    with RecordingServer(
        tmp_path_factory.mktemp("store") / "generations.db", *arguments, env=env, forks=True
    ) as server:
        yield server


@pytest.fixture
def rollout(request: pytest.FixtureRequest) -> str:
    """An id that no other test uses."""
    return f"{request.node.name} {uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Servers that start within seconds."""
    with Nursery() as nursery:
        yield nursery
