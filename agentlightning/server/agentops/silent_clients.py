"""Clients that logged in but never sent a trace, mostly for a reason that their users do not see."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

__all__ = ["CAUSE", "Client", "SilentClients"]

SECONDS_BEFORE_WARNING = 60.0
CLIENTS_REMEMBERED = 1_000

CAUSE = (
    'the AgentOps SDK up to 0.4.21 sends no traces with OpenTelemetry 1.45 or later, and logs "no attribute '
    "'_headers'\": pip install 'opentelemetry-sdk<1.45' 'opentelemetry-exporter-otlp-proto-http<1.45'"
)

logger = logging.getLogger("agentlightning.agentops")


@dataclass(slots=True)
class Client:
    """A client that has a token.

    Attributes:
        since: when it logged in, by `time.monotonic`.
        is_logged: whether the log names it.
    """

    name: str
    since: float
    is_logged: bool = False


class SilentClients:
    """The clients of this server process that have not sent a trace."""

    def __init__(self) -> None:
        self._silent: dict[str, Client] = {}

    def add(self, token_id: str, name: str) -> None:
        """Note a client that was given this token."""
        self._silent[token_id] = Client(name, time.monotonic())
        if len(self._silent) > CLIENTS_REMEMBERED:
            del self._silent[next(iter(self._silent))]

    def has_sent(self, token_id: str) -> None:
        """Note that a trace arrived with this token."""
        self._silent.pop(token_id, None)

    def silent(self) -> Sequence[Client]:
        """Return the clients in the order of their logins."""
        return list(self._silent.values())

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While the block runs, log each client that is silent for a minute; at its end, log the others."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            self._warn(time.monotonic())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BEFORE_WARNING / 4)
            self._warn(time.monotonic() - SECONDS_BEFORE_WARNING)

    def _warn(self, before: float) -> None:
        for client in self._silent.values():
            if not client.is_logged and client.since <= before:
                client.is_logged = True
                logger.warning("%s logged in, but has not sent a trace; likely cause: %s", client.name, CAUSE)
