"""How much the server takes at once, and the bodies of requests: whole, unpacked, and never larger than that."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.server.errors import sentence
from agentlightning.server.transactions import Busy

__all__ = [
    "BATCH_LIMIT",
    "DEPTH_LIMIT",
    "DEQUEUE_LIMIT",
    "DETAILS_LIMIT",
    "ID_LIMIT",
    "NUMBER_LIMIT",
    "PAGE_LIMIT",
    "STRANGERS_LIMIT",
    "WAITING_LIMIT",
    "Bodies",
    "Room",
]

BATCH_LIMIT = 10_000
"""Rollouts in one request to enqueue them, or to wait for them; generations in one request."""
DEQUEUE_LIMIT = 1_000
"""Rollouts in one request to dequeue them."""
DETAILS_LIMIT = 100_000
"""Events and links of the spans in one OTLP request. An empty one is two bytes, of which much more is made."""
PAGE_LIMIT = 10_000
"""Items on a page that has a limit; one that has none is sent as it is read."""
DEPTH_LIMIT = 200
"""Arrays and objects inside of one another, in a body: who reads it again has a limit, too, Python's near 1,000."""
ID_LIMIT = 512
"""Characters of an id or a name that is looked up."""
NUMBER_LIMIT = 2**53 - 1
"""The highest whole number that every reader of JSON tells from the next one."""
STRANGERS_LIMIT = 64 << 10
"""Bytes of a body where whoever sends it may have no key."""
WAITING_LIMIT = 256 << 20
"""Bytes of bodies that wait for the disk."""

# Most bodies are not larger, and are unpacked in the time that a thread would take to begin with it.
BYTES_AT_ONCE = 1 << 20


class Refused(Exception):
    """A body that is not taken.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """ASGI middleware: what is inside of it gets each body in one piece, unpacked if it was packed with gzip.

    Args:
        limit: how many bytes one may have.
        paths: those that it is for; all if not given.
    """

    def __init__(self, app: ASGIApp, limit: int, paths: Sequence[str] | None = None) -> None:
        self._app = app
        self._limit = limit
        self._paths = paths
        self._unpacking = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passes = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if passes or (self._paths is not None and scope["path"] not in self._paths):
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
            scope["headers"] = list(scope["headers"])
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
        if not declared.isdecimal() or int(declared) > self._limit:
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
            if size > self._limit:
                raise self._too_large()
            more = message.get("more_body", False)
        body = b"".join(parts)
        return await self._unpacked(body) if encoding == "gzip" and body else body

    async def _unpacked(self, body: bytes) -> bytes:
        unpacker = _Unpacker(body)
        try:
            unpacker.step()
            if not unpacker.ends:
                # One at a time: of many that become much more than they were, only one is in memory.
                async with self._unpacking:
                    await asyncio.to_thread(self._unpack, unpacker)
        except zlib.error as error:
            raise Refused(400, f"the body is not gzip, as its Content-Encoding says: {error}") from error
        except EOFError as error:
            raise Refused(400, "the body is cut off: its gzip does not end") from error
        if unpacker.size > self._limit:
            raise self._too_large()
        return b"".join(unpacker.parts)

    def _unpack(self, unpacker: _Unpacker) -> None:
        while not unpacker.ends and unpacker.size <= self._limit:
            unpacker.step()

    def _too_large(self) -> Refused:
        most = f"{self._limit >> 10} KiB"
        if self._limit >= 1 << 20:
            most = f"{self._limit >> 20} MiB (agl store --max-body-mb)"
        return Refused(413, f"the body is larger than {most}")


class Room:
    """For so many bytes at once; what is larger than that has it for itself."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._taken = 0

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Around what holds on to so many bytes.

        Raises:
            Busy: there is no room for them now.
        """
        if self._taken and self._taken + nbytes > self._nbytes:
            raise Busy(f"{self._taken >> 20} MiB wait for the disk already")
        self._taken += nbytes
        try:
            yield
        finally:
            self._taken -= nbytes


class _Unpacker:
    """Unpacks gzip step by step, so that nobody has to know how large it becomes.

    Attributes:
        ends: whether all is unpacked.
    """

    def __init__(self, body: bytes) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.ends = False
        self._rest = body
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def step(self) -> None:
        """Unpack some more.

        Raises:
            zlib.error: it is not gzip.
            EOFError: it is cut off.
        """
        part = self._member.decompress(self._rest, BYTES_AT_ONCE)
        self.parts.append(part)
        self.size += len(part)
        if not self._member.eof:
            self._rest = self._member.unconsumed_tail
            if not self._rest and len(part) < BYTES_AT_ONCE:
                raise EOFError
        elif self._member.unused_data:
            # Gzip may be several, one after the other; but no client sends it, and a million of them are nobody's.
            raise zlib.error("there is more behind its end")
        else:
            self.ends = True
