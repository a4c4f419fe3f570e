"""How much the server takes at once, and the bodies of requests: whole, unpacked, and never larger than that."""

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

__all__ = [
    "ARRIVING_LIMIT",
    "BATCH_LIMIT",
    "DEPTH_LIMIT",
    "DEQUEUE_LIMIT",
    "DETAILS_LIMIT",
    "ELEMENTS_LIMIT",
    "ID_LIMIT",
    "MESSAGES_LIMIT",
    "NUMBER_LIMIT",
    "PAGE_LIMIT",
    "STRANGERS_LIMIT",
    "VALUES_LIMIT",
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
MESSAGES_LIMIT = 500_000
"""Messages in one OTLP request, at whatever depth, but for the elements of arrays: an attribute is two."""
ELEMENTS_LIMIT = 2_000_000
"""Elements of arrays in one OTLP request, such as token ids."""
VALUES_LIMIT = 4_000_000
"""Elements of arrays, and fields of objects, in any other body in JSON."""
NUMBER_LIMIT = 2**53 - 1
"""The highest whole number that every reader of JSON tells from the next one."""
STRANGERS_LIMIT = 64 << 10
"""Bytes of a body where whoever sends it may have no key."""
WAITING_LIMIT = 256 << 20
"""Bytes of bodies that wait for the disk."""
ARRIVING_LIMIT = 256 << 20
"""Bytes of bodies that have not arrived as a whole, without the first `UNCOUNTED` of each."""

# Most bodies are not larger, and are unpacked in the time that a thread would take to begin with it.
BYTES_AT_ONCE = 1 << 20
# Small requests get in whatever else arrives: they are bounded by how many connections there are.
UNCOUNTED = 64 << 10
GZIP = ("gzip", "x-gzip")
# Of gzip, which is several, one after the other, where it was written in parts.
MEMBERS_LIMIT = 10_000
MEMBERS_AT_ONCE = 100
PACKED_AT_ONCE = 64 << 10


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
        arriving: has room for all that have not arrived yet.
        paths: those that it is for; all if not given.
    """

    def __init__(self, app: ASGIApp, limit: int, arriving: Room, paths: Sequence[str] | None = None) -> None:
        self._app = app
        self._limit = limit
        self._arriving = arriving
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
        except Busy as busy:
            await sentence(503, str(busy), {"Retry-After": "1"})(scope, receive, send)
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
        if encoding not in ("identity", *GZIP):
            raise Refused(415, f"a body may be packed with gzip, not with {encoding!r}")
        with self._arriving.growing("arrive") as counted:
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
                counted(size - UNCOUNTED)
                more = message.get("more_body", False)
            body = b"".join(parts)
            return await self._unpacked(body) if encoding in GZIP and body else body

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
        with self.growing("wait for the disk") as counted:
            counted(nbytes)
            yield

    @contextmanager
    def growing(self, what: str) -> Iterator[Callable[[int], None]]:
        """Around what holds on to more and more bytes; gives a function that is told how many they are.

        Args:
            what: they do, in words.

        Raises:
            Busy: there is no room for them now.
        """
        own = 0

        def count(nbytes: int) -> None:
            nonlocal own
            if nbytes <= own:
                return
            others = self._taken - own
            if others and others + nbytes > self._nbytes:
                raise Busy(f"{self._taken >> 20} MiB {what} already")
            self._taken += nbytes - own
            own = nbytes

        try:
            yield count
        finally:
            self._taken -= own


class _Unpacker:
    """Unpacks gzip step by step, so that nobody has to know how large it becomes.

    Attributes:
        ends: whether all is unpacked.
    """

    def __init__(self, body: bytes) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.ends = False
        self._body = body
        self._position = 0
        self._members = 1
        self._member = _member()

    def step(self) -> None:
        """Unpack some more.

        Raises:
            zlib.error: it is not gzip.
            EOFError: it is cut off.
        """
        most, members = self.size + BYTES_AT_ONCE, self._members + MEMBERS_AT_ONCE
        while not self.ends and self.size < most and self._members < members:
            # Not all of it: what is left over is copied each time.
            packed = self._body[self._position : self._position + PACKED_AT_ONCE]
            part = self._member.decompress(packed, most - self.size)
            self._position += len(packed) - len(self._member.unconsumed_tail) - len(self._member.unused_data)
            if part:
                self.parts.append(part)
                self.size += len(part)
            if self._member.eof:
                self._next()
            elif not part and not packed:
                raise EOFError

    def _next(self) -> None:
        if self._position == len(self._body):
            self.ends = True
            return
        self._members += 1
        if self._members > MEMBERS_LIMIT:
            raise zlib.error(f"it has more than {MEMBERS_LIMIT} members")
        self._member = _member()


def _member() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
