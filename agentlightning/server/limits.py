"""How much the server takes at once, and the bodies of requests: whole, unpacked, and never larger than that."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.server.errors import sentence

__all__ = ["BATCH_LIMIT", "DEQUEUE_LIMIT", "ID_LIMIT", "PAGE_LIMIT", "Bodies", "BodyLimit"]

BATCH_LIMIT = 10_000
"""Rollouts in one request to enqueue them, or to wait for them."""
DEQUEUE_LIMIT = 1_000
"""Rollouts in one request to dequeue them."""
PAGE_LIMIT = 10_000
"""Items on a page that has a limit; one that has none is sent as it is read."""
ID_LIMIT = 512
"""Characters of an id or a name that is looked up."""


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """Bytes of a body, unpacked."""

    bytes: int

    def __str__(self) -> str:
        return f"{self.bytes >> 20} MiB"


class Refused(Exception):
    """A body that is not taken.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """ASGI middleware: what is inside of it gets each body in one piece, unpacked if it was packed with gzip."""

    def __init__(self, app: ASGIApp, limit: BodyLimit) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            body = await self._body(headers, receive)
        except Refused as refused:
            await sentence(refused.status, str(refused))(scope, receive, send)
            return
        if body is None:
            return
        if "content-encoding" in headers:
            scope = {**scope, "headers": list(scope["headers"])}
            unpacked = MutableHeaders(scope=scope)
            del unpacked["content-encoding"]
            unpacked["content-length"] = str(len(body))
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None where the client is gone before its end."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._limit.bytes:
            raise self._too_large()
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):
            raise Refused(415, f"a body may be packed with gzip, not with {encoding!r}")
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self._limit.bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        body = b"".join(parts)
        return self._unpacked(body) if encoding == "gzip" and body else body

    def _unpacked(self, body: bytes) -> bytes:
        unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            # One byte more than is allowed tells that there is too much, however much there is.
            unpacked = unpacker.decompress(body, self._limit.bytes + 1)
        except zlib.error as error:
            raise Refused(400, f"the body is not gzip, as its Content-Encoding says: {error}") from error
        if len(unpacked) > self._limit.bytes:
            raise self._too_large()
        if not unpacker.eof:
            raise Refused(400, "the body is cut off: its gzip does not end")
        return unpacked

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._limit} (agl store --max-body-mb)")
