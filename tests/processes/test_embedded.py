"""A server inside another program, which serves vLLM's app itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.common.answers import fetch
from tests.common.vllm import RemoteOpenAIServer, started_by
from tests.processes.every_endpoint import carried, expected

pytestmark = pytest.mark.tier("all")

PROGRAM = ("python", "-m", "tests.processes.embedding_program", "--model")


@pytest.fixture(scope="module")
def embedded() -> Iterator[RemoteOpenAIServer]:
    # By fork, as vLLM does by itself where it is used as a library, and has a GPU.
    with RemoteOpenAIServer(command=PROGRAM, env={**started_by("fork"), "AGL_INSTRUMENT": "strict"}) as server:
        yield server


@pytest.mark.parametrize("below", ["", "/rollout/x/attempt/1"], ids=["as ever", "below a rollout"])
def test_every_answer_carries_ids(embedded: RemoteOpenAIServer, below: str) -> None:
    assert carried(embedded, below) == expected()


def test_the_status_of_an_embedded_server_describes_it(embedded: RemoteOpenAIServer) -> None:
    patches = fetch(embedded, "/v1/agl/status")["patches"]

    assert {patch["state"] for patch in patches.values()} == {"applied"}
