"""Weights that are handed over: which routes of vLLM are called, in which order, and what is said if one fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentlightning.errors import WeightsRefused
from agentlightning.trainers.weights import load_weights

pytestmark = pytest.mark.tier("check")


class Server(HTTPServer):
    """Keeps what it is asked, and answers a route with the status that it has for it, else 200.

    Like vLLM, it answers 200 where it could not reset its prefix cache, and says so in the body.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.statuses: dict[str, int] = {}
        self.resets_that_fail = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.path, json.loads(body) if body else None))
        self.send_response(self.server.statuses.get(self.path, 200))
        self.end_headers()
        if self.path != "/reset_prefix_cache":
            self.wfile.write(b"what went wrong")
            return
        self.wfile.write(json.dumps({"success": not self.server.resets_that_fail}).encode())
        self.server.resets_that_fail -= self.server.resets_that_fail > 0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name that it has in http.server
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_weights_are_loaded_the_cache_is_reset_and_then_the_version_is_named(server: Server, tmp_path: Path) -> None:
    load_weights(f"{server.url}/v1", tmp_path, "7")

    assert server.asked == [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}),
        ("/reset_prefix_cache", None),
        ("/update_weight_version", {"new_version": "7"}),
    ]


def test_a_vllm_without_the_routes_is_named_with_the_switch_that_it_needs(server: Server, tmp_path: Path) -> None:
    server.statuses["/collective_rpc"] = 404

    with pytest.raises(WeightsRefused, match=r"has no route /collective_rpc: start it with VLLM_SERVER_DEV_MODE=1"):
        load_weights(server.url, tmp_path, "7")


def test_a_version_is_not_named_where_its_weights_were_not_loaded(server: Server, tmp_path: Path) -> None:
    server.statuses["/collective_rpc"] = 500

    with pytest.raises(WeightsRefused, match=r"answered /collective_rpc with 500 \(what went wrong\): look at its log"):
        load_weights(server.url, tmp_path, "7")
    assert [path for path, _ in server.asked] == ["/collective_rpc"]


def test_the_cache_is_reset_again_while_requests_hold_blocks_of_it(server: Server, tmp_path: Path) -> None:
    server.resets_that_fail = 2

    load_weights(server.url, tmp_path, "7")

    paths = [path for path, _ in server.asked]
    assert paths == ["/collective_rpc", *["/reset_prefix_cache"] * 3, "/update_weight_version"]


def test_a_version_is_not_named_while_the_cache_has_blocks_of_older_weights(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentlightning.trainers.weights.RESET_DELAY", 0)
    server.resets_that_fail = 1000

    with pytest.raises(WeightsRefused, match=r"prefix cache still has blocks of the old ones: .*all agents have ended"):
        load_weights(server.url, tmp_path, "7")
    assert server.asked[-1] == ("/reset_prefix_cache", None)


def test_a_vllm_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match=r"vLLM at http://127.0.0.1:9 cannot be reached"):
        load_weights("http://127.0.0.1:9", tmp_path, "7")
