"""The summaries of rollouts, brought up to date when somebody looks at a list or a chart."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from sqlalchemy import Connection

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.server.transactions import Transactions
from agentlightning.store import summaries

__all__ = ["Summaries", "is_current", "mark"]

PATIENCE = 1.0
"""Seconds that a page waits for what has changed; after these it shows what there is, and says so."""
SECONDS_BETWEEN = 0.11
"""Pause between transactions, in which writers of a SQLite file get their turn: they try again every 0.1 s."""

logger = logging.getLogger("agentlightning.store")


class Summaries:
    """Refresh the summaries beside all requests, once for everybody who looks at the same time."""

    def __init__(self, database: Transactions) -> None:
        self._database = database
        self._refreshing: asyncio.Task[bool] | None = None

    async def look(self) -> bool:
        """Refresh what changed; tells whether all of it is refreshed."""
        if self._refreshing is None or self._refreshing.done():
            if not await self._database.read(summaries.are_stale):
                return True
            self._refreshing = asyncio.create_task(self._refresh())
        done, _ = await asyncio.wait({self._refreshing}, timeout=PATIENCE)
        return bool(done) and self._refreshing.result()

    async def finish(self) -> bool:
        """Refresh all that changed, however long that takes; tells whether it could be done."""
        if await self.look():
            return True
        return self._refreshing is not None and await asyncio.shield(self._refreshing)

    async def close(self) -> None:
        """Stop refreshing."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await self._refreshing

    async def _refresh(self) -> bool:
        try:
            while not await self._database.refresh_summaries():
                await asyncio.sleep(SECONDS_BETWEEN)
        except (StoreUnavailable, StoreRefused) as error:
            # A store that cannot be written shows what is there; the next look tries again.
            logger.warning("the list of rollouts cannot be brought up to date now: %s", error)
            return False
        except Exception:
            logger.exception("the list of rollouts cannot be brought up to date")
            return False
        return True


def mark(connection: Connection, seconds: int | None = None) -> str:
    """Name the state that a page shows, for `is_current`.

    Args:
        seconds: how long it holds although nothing is written, since it shows the time; None for any time.
    """
    return f"{summaries.revision(connection)}.{'' if seconds is None else f'{seconds}.{int(time.time() // seconds)}'}"


def is_current(connection: Connection, seen: str) -> bool:
    """Tell whether a page that was marked so would show the same now. Costs two rows, whatever the page."""
    _, _, period = seen.partition(".")
    seconds = period.partition(".")[0]
    known = int(seconds) if seconds.isascii() and seconds.isdigit() and int(seconds) else None
    return seen == mark(connection, known) and not summaries.are_stale(connection)
