"""Carriers of a rollout behind real routers: which arrive, and what `agl doctor` says of them."""

from __future__ import annotations

import json
import time
import urllib.request
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from agentlightning.doctor import carriers
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm._carriers import CARRIERS
from tests.common.answers import post
from tests.common.debian import NGINX
from tests.common.http_server import Quiet, serving
from tests.common.routers import VERSIONS, keeps_ids, router
from tests.common.vllm import SCRIPTS
from tests.doctor.command import run
from tests.recording.server import RecordingServer, until
from tools.routers import IDS, PAGE, SHOWN, row

BY_NAME = [
    "vllm-router",
    "smg",
    pytest.param("LiteLLM", marks=pytest.mark.tier("all")),
    pytest.param("nginx", marks=pytest.mark.tier("all")),
]


CHAT, COMPLETIONS, RESPONSES, MESSAGES = (f"/v1/{endpoint}" for endpoint in carriers.ENDPOINTS)
VIA = {
    "vllm-router": {CHAT: "http", COMPLETIONS: "http", RESPONSES: "router", MESSAGES: "router"},
    "smg": {CHAT: "router", COMPLETIONS: "router", RESPONSES: "router", MESSAGES: "router"},
    "LiteLLM": {CHAT: "router", COMPLETIONS: "http", RESPONSES: "router"},
    "nginx": {CHAT: "http", COMPLETIONS: "http", RESPONSES: "http", MESSAGES: "http"},
}
"""The way that a call came, as far as a server sees it, by the endpoint that the router calls."""


def documented(name: str) -> dict[str, str]:
    """Return what the documentation says of a router, by row; its version is checked."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = cells[0].index(f"{name} {VERSIONS[name]}".strip())
    by_row = {line[0]: line[column] for line in cells if len(line) > column}
    return {row: by_row[row] for row in (*SHOWN.values(), IDS)}


@pytest.mark.takes_long("it may install the router")
@pytest.mark.parametrize("name", BY_NAME)
def test_carriers_arrive_behind_a_router_as_documented(two_api_servers: RecordingServer, name: str) -> None:
    if name == "nginx" and NGINX.find() is None:
        pytest.skip(NGINX.missing)
    server = two_api_servers
    began = time.time_ns()
    asked = {"model": server.model, "prompt": "last", "max_tokens": 1}
    last = array("i", post(server, "/v1/completions", asked)["choices"][0]["prompt_token_ids"])

    def new() -> list[Generation]:
        """Return what was recorded meanwhile, without the calls by which recorded() waits."""
        found = [each for each in server.recorded() if (each.started_at or 0) >= began]
        return [each for each in found if each.prompt_token_ids != last]

    with router(name, [server.url], server.model) as url:
        found = carriers.read(url, None)
        said: Any = run(SCRIPTS / "agl", "doctor", "--url", url)
        probed = new()
        kept = keeps_ids(url, server.model)

    assert {**{SHOWN[carrier]: row(found, carrier) for carrier in CARRIERS}, IDS: kept} == documented(name)
    assert said.status == 0
    expected = ["ok rollouts every way to name one arrives, over chat/completions"]
    if name != "nginx":
        expected = [
            f"{carriers.SHOWN.get(carrier, carrier)} "
            f"{'does not arrive' if row(found, carrier) == '**none**' else 'arrives over'}"
            for carrier in CARRIERS
        ]
    assert [each for each in expected if each not in said.text] == []
    assert probed == []
    # Another process may have recorded them than the one that recorded the last call.
    until(lambda: VIA[name].keys() <= {each.endpoint for each in new()}, "a call over each endpoint")
    assert {each.endpoint: each.via for each in new()} == VIA[name]


def test_every_carrier_arrives_without_a_router(two_api_servers: RecordingServer) -> None:
    assert carriers.read(two_api_servers.url, None) == {
        endpoint: [each for each in CARRIERS if (each, endpoint) != ("user", "messages")]
        for endpoint in carriers.ENDPOINTS
    }


@contextmanager
def stand_in() -> Iterator[tuple[str, list[str]]]:
    """Serve what routers ask of a vLLM server; yields its URL, and the paths of the calls that it gets."""
    calls: list[str] = []
    model = {"id": "tiny", "object": "model", "created": 1, "owned_by": "vllm", "root": "tiny", "max_model_len": 100}
    message = {"role": "assistant", "content": "one"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    chat = {"id": "c", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice], "usage": usage}

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"object": "list", "data": [model], "model_path": "tiny", "version": "0.32.0"})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            calls.append(self.path)
            self._answer(chat)

        def _answer(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as url:
        yield url, calls


STICKY = {
    "vllm-router": ("vllm-router", ["--policy=consistent_hash"], {"x-correlation-id": "agl/{}/x"}),
    "vllm-router, by session": ("vllm-router", ["--policy=consistent_hash"], {"x-session-id": "{}"}),
    "smg": ("smg", ["--policy=consistent_hashing"], {"x-smg-routing-key": "{}"}),
    "smg, by key": (
        "smg",
        ["--policy=consistent_hashing", "--routing-key-headers", "authorization"],
        {"Authorization": "Bearer none@rollout={}"},
    ),
    "nginx": ("nginx", [], {"x-agl-rollout-id": "{}"}),
}
# So many rollouts that none of the two servers is left out by chance.
ROLLOUTS, CALLS = 40, 2


@pytest.mark.tier("all")
@pytest.mark.takes_long("it may install the router")
@pytest.mark.parametrize(("name", "options", "headers"), STICKY.values(), ids=STICKY)
def test_calls_of_a_rollout_stay_on_one_server_as_documented(
    name: str, options: list[str], headers: dict[str, str]
) -> None:
    if name == "nginx" and NGINX.find() is None:
        pytest.skip(NGINX.missing)
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "one"}]}).encode()
    with (
        stand_in() as (first, calls),
        stand_in() as (second, others),
        router(name, [first, second], "tiny", *options) as url,
    ):

        def ask(rollout: str) -> tuple[int, int]:
            """Call for a rollout; returns how many more calls each server has then."""
            before = len(calls), len(others)
            sent = {header: value.format(rollout) for header, value in headers.items()}
            for _ in range(CALLS):
                asked = {"Content-Type": "application/json", **sent}
                request = urllib.request.Request(f"{url}/v1/chat/completions", body, asked)
                urllib.request.urlopen(request, timeout=60).close()
            return len(calls) - before[0], len(others) - before[1]

        # A router may serve before it knows both.
        until(lambda: ask(uuid.uuid4().hex) and calls and others, "a call of each server")
        seen = {ask(f"ro-{number}") for number in range(ROLLOUTS)}

    assert seen == {(CALLS, 0), (0, CALLS)}
