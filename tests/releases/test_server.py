"""The server around the answers: clients that hang up, several processes, and what it says of itself."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.common.answers import fetch, get, tokenize
from tests.common.vllm import RemoteOpenAIServer, processes_that_serve
from tests.releases.chosen import ANYTHING
from tests.releases.engine import Engine
from tests.releases.table import API_SERVERS, Release
from tests.releases.test_ids import MESSAGES, chat

STATUS = "/v1/agl/status"
SECONDS = 60
MOST_CLIENTS = 640
LOOKS = 50


def running(server: RemoteOpenAIServer) -> float:
    """Return how many requests the engine had when it answered last, as the server's metrics say."""
    _, metrics = get(server, "/metrics/")
    lines = [line for line in metrics.decode().splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def hang_up(server: RemoteOpenAIServer, body: Any) -> None:
    """Ask for a chat, and be gone when the engine has begun with it."""
    sent = json.dumps(body).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(head % len(sent) + sent)
        # It may have ended again before anybody looks.
        for _ in range(LOOKS):
            if running(server):
                return


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_client_that_hangs_up_changes_no_other_answer(armed: RemoteOpenAIServer, engine: Engine, stream: bool) -> None:
    options = engine.asks(ANYTHING, max_tokens=900, ignore_eos=True)
    client, log = armed.client(), len(armed.log)
    for _ in range(3):
        if stream:
            create = client.chat.completions.create
            with create(model=armed.model, messages=MESSAGES, stream=True, extra_body=options) as chunks:
                next(iter(chunks))
        else:
            hang_up(armed, {"model": armed.model, "messages": MESSAGES, **options})

    deadline = time.monotonic() + SECONDS
    while True:
        answer = chat(armed, **engine.asks(ANYTHING))
        assert answer.response_token_ids == [engine.says(ANYTHING, answer.prompt_token_ids, 24)]
        if not running(armed) or time.monotonic() > deadline:
            break
    assert running(armed) == 0
    assert "Traceback" not in armed.log[log:]


@pytest.mark.check(API_SERVERS)
def test_each_of_two_api_servers_attaches_ids(two_api_servers: RemoteOpenAIServer, engine: Engine) -> None:
    clients: list[openai.OpenAI] = []
    expected = engine.says(ANYTHING, tokenize(two_api_servers, messages=MESSAGES), 16)

    def ask(client: openai.OpenAI) -> Any:
        options = engine.asks(ANYTHING, max_tokens=16)
        return client.chat.completions.create(model=two_api_servers.model, messages=MESSAGES, extra_body=options)

    # The system chooses which of them is given a connection.
    while len(processes_that_serve(two_api_servers)) < 2 and len(clients) < MOST_CLIENTS:
        new = [two_api_servers.client() for _ in range(32)]
        clients += new
        with ThreadPoolExecutor(len(new)) as threads:
            assert all(answer.response_token_ids == [expected] for answer in threads.map(ask, new))

    assert len(processes_that_serve(two_api_servers)) == 2


def test_status_after_all_requests_counts_no_failure(armed: RemoteOpenAIServer, release: Release) -> None:
    status = fetch(armed, STATUS)
    states = {name: patch["state"] for name, patch in status["patches"].items()}

    assert states["chat"] == states["completions"] == "applied"
    # The V0 engine has another output processor.
    assert states["capture"] == ("applied" if release.engine == "V1" else "pending")
    assert "failed" not in states.values()
    assert status["counters"]["failures"] == {}
    # What a set is not for is no line, in no release.
    start = [line for line in notices(armed) if " is on in vLLM " in line]
    assert len(start) == 1
    assert [line for line in notices(armed) if line not in start] == [V0] * (release.engine == "V0")


V0 = (
    "vLLM's V0 engine answers (VLLM_USE_V1=0, or what V1 of this release cannot do): only chat and completions carry "
    "ids, and nothing is recorded"
)


def notices(server: RemoteOpenAIServer) -> list[str]:
    """Return our own lines of the log."""
    return [line.partition("agentlightning: ")[2] for line in server.log.splitlines() if "agentlightning: " in line]
