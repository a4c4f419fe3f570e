"""Connections of clients, closed if no complete request arrives in time, so that others have room."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["ClientConnection", "raise_file_limit"]

SECONDS_TO_ASK = 30.0
"""From the start of a connection, or the end of an answer, to the end of the next request's headers."""
SECONDS_TO_SEND = 30.0
"""Seconds for the body of a request, in addition to the time that it takes at `BYTES_PER_SECOND`."""
BYTES_PER_SECOND = 16 << 10
SECONDS_BETWEEN_CHECKS = 2.0
SECONDS_BETWEEN_WARNINGS = 10.0

FILES_WANTED = 65_536
# For the database, the log, and other open files.
FILES_RESERVED = 64

logger = logging.getLogger("agentlightning.store")


def raise_file_limit() -> int:
    """Raise the limit of open files, connections included; return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        logger.info("raised the limit of open files and connections from %d to %d", soft, wanted)
        soft = wanted
    most = FILES_WANTED if soft == resource.RLIM_INFINITY else soft
    return max(most - FILES_RESERVED, most // 2)


class ClientConnection(HttpToolsProtocol):
    """A connection to a client.

    Attributes:
        limit: how many connections may be open; above it, idle ones are closed, the oldest first.
    """

    limit: ClassVar[int] = FILES_WANTED
    _open: ClassVar[dict[ClientConnection, None]] = {}
    _next_check: ClassVar[asyncio.TimerHandle | None] = None
    _warned_at: ClassVar[float] = float("-inf")

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # When it became idle, when it began to send the body of a request, and how much of that has arrived.
        self._idle_since = self.loop.time()
        self._body_since: float | None = None
        self._body_size = 0
        self._open[self] = None
        if len(self._open) > self.limit:
            self._make_room()
        if ClientConnection._next_check is None:
            ClientConnection._next_check = self.loop.call_later(SECONDS_BETWEEN_CHECKS, self._check_all, self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.pop(self, None)
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        self._body_since, self._body_size = self.loop.time(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._body_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def _is_idle(self) -> bool:
        """True while no request on it is being sent or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _is_late(self, now: float) -> bool:
        if self._is_idle:
            return now - self._idle_since > SECONDS_TO_ASK
        allowed = SECONDS_TO_SEND + self._body_size / BYTES_PER_SECOND
        return self._body_since is not None and now - self._body_since > allowed

    def _make_room(self) -> None:
        oldest = next((each for each in self._open if each is not self and each._is_idle), None)
        if oldest is not None:
            oldest._close()
        self._warn("more than %d connections: closing idle ones; raise the limit of open files (ulimit -n)", self.limit)

    def _close(self) -> None:
        self._open.pop(self, None)
        self.transport.close()

    @classmethod
    def _check_all(cls, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        late = [each for each in cls._open if each._is_late(now)]
        for each in late:
            each._close()
        if late:
            cls._warn("closed %d connections that sent no complete request in time", len(late))
        cls._next_check = loop.call_later(SECONDS_BETWEEN_CHECKS, cls._check_all, loop) if cls._open else None

    @classmethod
    def _warn(cls, text: str, number: int) -> None:
        """Log a warning, unless one was logged a moment ago."""
        now = asyncio.get_running_loop().time()
        if now - ClientConnection._warned_at >= SECONDS_BETWEEN_WARNINGS:
            ClientConnection._warned_at = now
            logger.warning(text, number)
