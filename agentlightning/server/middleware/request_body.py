"""Request bodies: buffered, decompressed, and limited in size."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.server.errors import sentence
from agentlightning.server.transactions import Busy

__all__ = ["ByteBudget", "RequestBodyMiddleware"]

# Most bodies are smaller, and are decompressed in the time that it would take to start a thread.
BYTES_PER_STEP = 1 << 20
# Small requests are admitted whatever else arrives: the number of connections bounds them.
UNCOUNTED = 64 << 10
GZIP = ("gzip", "x-gzip")
# A gzip body has several members, one after the other, if it was written in parts.
MEMBERS_LIMIT = 10_000
MEMBERS_PER_STEP = 100
COMPRESSED_PER_STEP = 64 << 10


class BodyRefused(Exception):
    """Raised for a body that is not accepted.

    Attributes:
        status: the HTTP status of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestBodyMiddleware:
    """Buffer, decompress and size-limit request bodies: the application receives each in one piece.

    Args:
        limit: the size of one body in bytes.
        arriving: the budget for all bodies that are still arriving.
        paths: the paths that this applies to; None for all.
    """

    def __init__(self, app: ASGIApp, limit: int, arriving: ByteBudget, paths: Sequence[str] | None = None) -> None:
        self._app = app
        self._limit = limit
        self._arriving = arriving
        self._paths = paths
        self._decompressing = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_no_body = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if has_no_body or (self._paths is not None and scope["path"] not in self._paths):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            body = await self._body(headers, receive)
        except BodyRefused as refused:
            await sentence(refused.status, str(refused))(scope, receive, send)
            return
        except Busy as busy:
            await sentence(503, str(busy), {"Retry-After": "1"})(scope, receive, send)
            return
        if body is None:
            return
        if "content-encoding" in headers:
            scope["headers"] = list(scope["headers"])
            decompressed = MutableHeaders(scope=scope)
            del decompressed["content-encoding"]
            decompressed["content-length"] = str(len(body))
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnects before its end."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._limit:
            raise self._too_large()
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", *GZIP):
            raise BodyRefused(415, f"unsupported Content-Encoding {encoding!r}: send the body as gzip or uncompressed")
        with self._arriving.growing("are still arriving") as count:
            parts: list[bytes] = []
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > self._limit:
                    raise self._too_large()
                count(size - UNCOUNTED)
                more = message.get("more_body", False)
            body = b"".join(parts)
            return await self._decompressed(body) if encoding in GZIP and body else body

    async def _decompressed(self, body: bytes) -> bytes:
        decompressor = _Decompressor(body)
        try:
            decompressor.step()
            if not decompressor.is_done:
                # One at a time: of many bodies that grow large, only one is in memory.
                async with self._decompressing:
                    await asyncio.to_thread(self._decompress, decompressor)
        except zlib.error as error:
            raise BodyRefused(400, f"the body is not the gzip that its Content-Encoding promises: {error}") from error
        except EOFError as error:
            raise BodyRefused(400, "the body is truncated: its gzip stream does not end") from error
        if decompressor.size > self._limit:
            raise self._too_large()
        return b"".join(decompressor.parts)

    def _decompress(self, decompressor: _Decompressor) -> None:
        while not decompressor.is_done and decompressor.size <= self._limit:
            decompressor.step()

    def _too_large(self) -> BodyRefused:
        limit = f"{self._limit >> 10} KiB"
        if self._limit >= 1 << 20:
            limit = f"{self._limit >> 20} MiB (agl store --max-body-mb)"
        return BodyRefused(413, f"the body is larger than {limit}")


class ByteBudget:
    """Cap the bytes in flight; admit an oversized body only when nothing else is in flight."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Count these bytes while the block runs.

        Raises:
            Busy: they exceed the budget now.
        """
        with self.growing("wait for the disk") as count:
            count(nbytes)
            yield

    @contextmanager
    def growing(self, state: str) -> Iterator[Callable[[int], None]]:
        """Count bytes that become more while the block runs; yields a function to call with their number so far.

        Args:
            state: what the bytes in flight do, for the message of `Busy`.

        Raises:
            Busy: they exceed the budget now.
        """
        own = 0

        def count(nbytes: int) -> None:
            nonlocal own
            if nbytes <= own:
                return
            others = self._in_flight - own
            if others and others + nbytes > self._limit:
                raise Busy(f"{self._in_flight >> 20} MiB of request bodies {state} already; try again later")
            self._in_flight += nbytes - own
            own = nbytes

        try:
            yield count
        finally:
            self._in_flight -= own


class _Decompressor:
    """Decompress gzip step by step, without knowing in advance how large the result becomes.

    Attributes:
        is_done: whether everything is decompressed.
    """

    def __init__(self, body: bytes) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.is_done = False
        self._body = body
        self._position = 0
        self._members = 1
        self._member = _member()

    def step(self) -> None:
        """Decompress some more.

        Raises:
            zlib.error: the body is not gzip.
            EOFError: the body is truncated.
        """
        size_limit, members_limit = self.size + BYTES_PER_STEP, self._members + MEMBERS_PER_STEP
        while not self.is_done and self.size < size_limit and self._members < members_limit:
            # A part of the body: zlib copies what it leaves over, each time.
            compressed = self._body[self._position : self._position + COMPRESSED_PER_STEP]
            part = self._member.decompress(compressed, size_limit - self.size)
            self._position += len(compressed) - len(self._member.unconsumed_tail) - len(self._member.unused_data)
            if part:
                self.parts.append(part)
                self.size += len(part)
            if self._member.eof:
                self._begin_next_member()
            elif not part and not compressed:
                raise EOFError

    def _begin_next_member(self) -> None:
        if self._position == len(self._body):
            self.is_done = True
            return
        self._members += 1
        if self._members > MEMBERS_LIMIT:
            raise zlib.error(f"it has more than {MEMBERS_LIMIT} members")
        self._member = _member()


def _member() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
