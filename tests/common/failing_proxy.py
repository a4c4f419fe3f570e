"""A proxy that fails the first call of an agent, as servers and networks do, and lets all others through."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import urlsplit

from tests.common.http_server import Quiet, serving

__all__ = ["Failure", "failing_once"]

Failure = Literal["500", "429", "answer lost"]
"""Status of the first answer, whose call never reaches the server; or a server that answers to nobody."""

HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")
PIECE = 1 << 16


@contextmanager
def failing_once(upstream: str, how: Failure) -> Iterator[str]:
    """Serve a proxy of a server; yields its URL."""
    failures = iter([how])

    class Handler(Quiet, BaseHTTPRequestHandler):
        # By HTTP/1.0: each answer ends where its connection does.
        def do_POST(self) -> None:
            failure = next(failures, None) if self.command == "POST" else None
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if failure in ("500", "429"):
                self.send_response(int(failure))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(b'{"error": {"message": "try again", "type": "server_error"}}')
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            connection = http.client.HTTPConnection(urlsplit(upstream).netloc)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            if failure is not None:
                answer.read()
                connection.close()
                return
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.end_headers()
            while piece := answer.read1(PIECE):
                self.wfile.write(piece)
                self.wfile.flush()
            connection.close()

        def do_GET(self) -> None:
            self.do_POST()

        def do_HEAD(self) -> None:
            self.do_POST()

    with serving(Handler) as url:
        yield url
