"""A client that takes little of the machine that it shares with the server, so that it is the server that is measured.

No HTTP library: requests are bytes that were made beforehand, and of an answer no more is read than where it ends.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import msgspec

HOST = "127.0.0.1"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
LAST_CHUNK = b"0\r\n\r\n"


class UnexpectedAnswer(Exception):
    """A server did not do what it was asked."""


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A whole request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(path: str) -> bytes:
    """A whole request."""
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


class Connection(asyncio.Protocol):
    """One that is kept, for a request at a time."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing: int | None = None
        """Bytes of the answer that are not here; None where they come in chunks, or nothing is known yet."""
        self._end = b""
        self._answer: asyncio.Future[bytes] | None = None

    @classmethod
    async def to(cls, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        return connection

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer, in chunks if it came so.

        Raises:
            UnexpectedAnswer: it says that something went wrong, or there is none.
        """
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        head, _, body = (await self._answer).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 2"):
            raise UnexpectedAnswer(f"{head[:100]!r} {body[:500]!r}")
        return body if LENGTH.search(head) else without_chunks(body)

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._parts:
            head, found, body = data.partition(b"\r\n\r\n")
            if not found:
                # No server sends less than its headers at once.
                self._transport.abort()
                return
            length = LENGTH.search(head)
            self._missing = int(length[1]) - len(body) if length else None if CHUNKED.search(head) else 0
        elif self._missing is not None:
            self._missing -= len(data)
        self._parts.append(data)
        # No JSON that a server writes has these bytes within it: line breaks in strings are escaped.
        self._end = (self._end + data)[-len(LAST_CHUNK) :] if len(data) < len(LAST_CHUNK) else data[-len(LAST_CHUNK) :]
        if self._answer and (self._missing == 0 or (self._missing is None and self._end == LAST_CHUNK)):
            parts, self._parts = self._parts, []
            self._answer.set_result(b"".join(parts))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(UnexpectedAnswer("the connection has ended before the answer"))


def without_chunks(body: bytes) -> bytes:
    """Return what chunks are of."""
    parts: list[bytes] = []
    position = 0
    while size := int(body[position : (end := body.index(b"\r\n", position))], 16):
        parts.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
    return b"".join(parts)


@dataclass(frozen=True)
class Load:
    """The results of some requests: the bodies of the answers are in the order of the requests."""

    seconds: float
    answers: Sequence[bytes]

    def parsed(self) -> list[Any]:
        return [msgspec.json.decode(answer) for answer in self.answers]


async def at_once(port: int, connections: int, work: Callable[[int, Connection], Awaitable[None]]) -> float:
    """Seconds of so many at once, each with its number and a connection of its own, which is there before."""
    # Not those of the turn before: a server closes one that has been idle for a few seconds.
    opened = [await Connection.to(port) for _ in range(connections)]
    try:
        started = time.perf_counter()
        await asyncio.gather(*(work(number, connection) for number, connection in enumerate(opened)))
        return time.perf_counter() - started
    finally:
        for connection in opened:
            connection.close()


async def send(port: int, requests: Sequence[bytes], connections: int) -> Load:
    """Send requests, so many at once: each connection has every so-many-th of them, and sends those in order."""
    answers = [b""] * len(requests)

    async def work(first: int, connection: Connection) -> None:
        for number in range(first, len(requests), connections):
            answers[number] = await connection.ask(requests[number])

    return Load(await at_once(port, connections, work), answers)


async def ask(port: int, request: bytes) -> Any:
    """Return the answer to one request."""
    with closing(await Connection.to(port)) as connection:
        return msgspec.json.decode(await connection.ask(request))
