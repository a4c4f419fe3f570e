"""Connections of clients: those that never send a whole request are closed, and leave room for others."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Connection", "raise_file_limit"]

SECONDS_TO_ASK = 30.0
"""From a connection, or the end of an answer, to the end of the next request's head."""
SECONDS_TO_SEND = 30.0
"""For the body of a request, besides the time that it takes at `BYTES_A_SECOND`."""
BYTES_A_SECOND = 16 << 10
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_LINES = 10.0

FILES_WANTED = 65_536
# For the database, the log, and what else is open.
FILES_KEPT = 64

logger = logging.getLogger("agentlightning.store")


def raise_file_limit() -> int:
    """Let the process have more files open, connections included; returns how many connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        logger.info("up to %d files and connections may be open at once: the limit was %d", wanted, soft)
        soft = wanted
    most = FILES_WANTED if soft == resource.RLIM_INFINITY else soft
    return max(most - FILES_KEPT, most // 2)


class Connection(HttpToolsProtocol):
    """A connection to a client.

    Attributes:
        most: how many there may be; where there are more, those that ask for nothing are closed, the oldest first.
    """

    most: ClassVar[int] = FILES_WANTED
    _open: ClassVar[dict[Connection, None]] = {}
    _look: ClassVar[asyncio.TimerHandle | None] = None
    _told_at: ClassVar[float] = float("-inf")

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Since when it has asked for nothing, or has sent the body of a request, and how much of it.
        self._asks_since = self.loop.time()
        self._sends_since: float | None = None
        self._sent = 0
        self._open[self] = None
        if len(self._open) > self.most:
            self._make_room()
        if Connection._look is None:
            Connection._look = self.loop.call_later(SECONDS_BETWEEN_LOOKS, self._look_at_all, self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.pop(self, None)
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        self._sends_since, self._sent = self.loop.time(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._sent += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._sends_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._asks_since = self.loop.time()
        super().on_response_complete()

    @property
    def _asks_for_nothing(self) -> bool:
        """Whether no request of it is being answered, or sent."""
        return self.cycle is None or self.cycle.response_complete

    def _is_late(self, now: float) -> bool:
        if self._asks_for_nothing:
            return now - self._asks_since > SECONDS_TO_ASK
        return self._sends_since is not None and now - self._sends_since > SECONDS_TO_SEND + self._sent / BYTES_A_SECOND

    def _make_room(self) -> None:
        oldest = next((each for each in self._open if each is not self and each._asks_for_nothing), None)
        if oldest is not None:
            oldest._close()
        self._tell(
            "%d connections are open, which is what the limit of open files (ulimit -n) leaves room for: "
            "those that ask for nothing are closed",
            self.most,
        )

    def _close(self) -> None:
        self._open.pop(self, None)
        self.transport.close()

    @classmethod
    def _look_at_all(cls, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        late = [each for each in cls._open if each._is_late(now)]
        for each in late:
            each._close()
        if late:
            cls._tell("%d connections are closed that sent no whole request in time", len(late))
        cls._look = loop.call_later(SECONDS_BETWEEN_LOOKS, cls._look_at_all, loop) if cls._open else None

    @classmethod
    def _tell(cls, text: str, number: int) -> None:
        """Log it, unless something was logged a moment ago."""
        now = asyncio.get_running_loop().time()
        if now - Connection._told_at >= SECONDS_BETWEEN_LINES:
            Connection._told_at = now
            logger.warning(text, number)
