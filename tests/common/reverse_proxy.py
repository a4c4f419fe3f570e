"""A small reverse proxy: `python -m tests.common.reverse_proxy PATH UPSTREAM HOW`, which prints its port.

It is a stand-in for Traefik and others, in a process of its own: what is below PATH goes to the store, by HTTP/1.0
and with the client's own `Host`, and everything else is 404. HOW is what happens to the path, which differs between
proxies: `kept`, `removed`, or `forwarded`, which is removed and named in `X-Forwarded-Prefix`.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from tests.common.environments import CHECKOUT

__all__ = ["PATH", "PathHandling", "reverse_proxy"]

PATH = "/tools/agl"
PathHandling = Literal["kept", "removed", "forwarded"]

# Headers of one connection, which a proxy has two of.
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")


@contextmanager
def reverse_proxy(upstream: str, how: PathHandling) -> Iterator[str]:
    """Serve a store below `PATH`; yields the URL of the proxy, without the path."""
    command = [sys.executable, "-m", __name__, PATH, upstream, how]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _serve(path: str, upstream: str, how: PathHandling) -> None:
    assert how in get_args(PathHandling)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{path}/"):
                self.send_error(404)
                return
            length = int(self.headers.get("content-length", 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            if how == "forwarded":
                headers["X-Forwarded-Prefix"] = path
            connection = http.client.HTTPConnection(urlsplit(upstream).netloc)
            target = self.path if how == "kept" else self.path.removeprefix(path)
            connection.request(self.command, target, self.rfile.read(length), headers)
            answer = connection.getresponse()
            body = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (*HOP_BY_HOP, "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            connection.close()

        do_POST = do_GET  # noqa: N815 -- the name that http.server calls

        def log_message(self, *_: Any, **__: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        sys.stdout.write(f"{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.argv[3])  # type: ignore[arg-type]
