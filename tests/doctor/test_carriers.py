"""Findings of `agl doctor` about carriers, from the answers of a server that a test plays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any

import pytest

from agentlightning.doctor import Mark, carriers
from agentlightning.instrumentation.vllm._carriers import CARRIER_HEADER, CARRIERS, PROBE_PARAMS
from tests.common.http_server import Quiet, serving

pytestmark = pytest.mark.tier("check")

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], int]
"""Returns the status of the answer to a call, whose header says that the path's rollout arrived."""


@contextmanager
def played(answer: Answer) -> Iterator[str]:
    """Serve a model, and answers to its calls; yields the URL."""

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            self._send(answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"])))), {})

        def _send(self, status: int, body: object) -> None:
            self.send_response(status)
            self.send_header(CARRIER_HEADER, "path")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    with serving(Handler) as url:
        yield url


def test_only_calls_that_are_served_show_what_arrives() -> None:
    def answer(call: BaseHTTPRequestHandler, body: dict[str, Any]) -> int:
        assert body.items() >= PROBE_PARAMS.items()
        return 200 if call.path.endswith("completions") else 404

    with played(answer) as url:
        arrived = carriers.read(url, None)

    assert arrived == {"chat/completions": ["path"], "completions": ["path"], "responses": [], "messages": []}
    shown = {each.subject: each for each in carriers.findings(arrived)}
    assert shown[carriers.SHOWN["path"]].text == "arrives over chat/completions, completions"
    assert shown["baggage"].text == "does not arrive: calls that it names have no rollout"


def test_server_that_does_not_answer_in_time_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "SECONDS", 0.5)
    paths: list[str] = []
    ended = Event()

    def answer(call: BaseHTTPRequestHandler, body: dict[str, Any]) -> int:
        paths.append(call.path)
        ended.wait()
        return 200

    with played(answer) as url:
        try:
            arrived = carriers.read(url, None)
        finally:
            ended.set()

    assert arrived == {"chat/completions": None}
    assert len(paths) == 1
    (finding,) = carriers.findings(arrived)
    assert finding.mark is Mark.NOTE
    assert "did not answer within" in finding.text


def test_all_that_arrive_are_one_finding() -> None:
    (finding,) = carriers.findings(
        {"completions": list(CARRIERS), "messages": [each for each in CARRIERS if each != "user"]}
    )

    assert finding.text == "every way to name one arrives, over completions, messages"
