"""Clients that have logged in and sent no trace: most have a reason that their user does not see."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

__all__ = ["CAUSE", "Client", "Clients"]

SECONDS_TO_WAIT = 60.0
REMEMBERED = 1_000

CAUSE = (
    'the AgentOps SDK up to 0.4.21 sends none where it finds OpenTelemetry 1.45 or later, and logs "no attribute '
    "'_headers'\": pip install 'opentelemetry-sdk<1.45' 'opentelemetry-exporter-otlp-proto-http<1.45'"
)

logger = logging.getLogger("agentlightning.agentops")


@dataclass(slots=True)
class Client:
    """Who has got a token.

    Attributes:
        since: `time.monotonic` of that.
        is_told: whether the log has it.
    """

    name: str
    since: float
    is_told: bool = False


class Clients:
    """Those of this server that have sent no trace yet."""

    def __init__(self) -> None:
        self._silent: dict[str, Client] = {}

    def has_come(self, token_id: str, name: str) -> None:
        """It has got this token."""
        self._silent[token_id] = Client(name, time.monotonic())
        if len(self._silent) > REMEMBERED:
            del self._silent[next(iter(self._silent))]

    def has_sent(self, token_id: str) -> None:
        """A trace has come with this token."""
        self._silent.pop(token_id, None)

    def silent(self) -> Sequence[Client]:
        """In the order in which they came."""
        return list(self._silent.values())

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While the block runs, tell the log of each that has been silent for a minute; at its end of the others."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            self._tell(time.monotonic())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_TO_WAIT / 4)
            self._tell(time.monotonic() - SECONDS_TO_WAIT)

    def _tell(self, before: float) -> None:
        for client in self._silent.values():
            if not client.is_told and client.since <= before:
                client.is_told = True
                logger.warning("%s has got a token, and sent no trace: %s", client.name, CAUSE)
