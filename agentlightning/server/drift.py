"""The index of drift, brought up to date in the background once somebody looks at it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy import Connection

from agentlightning.drift import AttemptDrift
from agentlightning.errors import RolloutTooLarge, StoreRefused, StoreUnavailable
from agentlightning.server.transactions import Transactions
from agentlightning.store import drift, drift_index
from agentlightning.store.drift_index import State

__all__ = ["DriftIndex"]

ROLLOUTS_KEPT = 32

logger = logging.getLogger("agentlightning.store")


class DriftIndex:
    """Compare rollouts, one after the other and beside all requests, until every one is compared."""

    def __init__(self, database: Transactions) -> None:
        self._database = database
        self._latest: dict[str, tuple[State, Sequence[AttemptDrift] | None]] = {}
        self._comparing: asyncio.Task[None] | None = None

    async def look(self) -> bool:
        """Begin to compare what is new; tells whether there was nothing to compare."""
        if self._comparing is not None and not self._comparing.done():
            return False
        with suppress(StoreUnavailable, StoreRefused):
            found = await self._database.read(drift_index.changed)
            if not found.rollouts and found.seen is None:
                return True
            if self._comparing is None or self._comparing.done():
                self._comparing = asyncio.create_task(self._compare_all())
        return False

    async def attempts(self, rollout_id: str) -> Sequence[AttemptDrift] | None:
        """Return the drift of a rollout's attempts; None where its calls cannot be compared.

        Raises:
            StoreUnavailable: the store cannot be read now.
        """
        return (await self._compare(rollout_id))[1]

    async def close(self) -> None:
        """Stop comparing."""
        if self._comparing is not None:
            self._comparing.cancel()
            with suppress(asyncio.CancelledError):
                await self._comparing

    async def _compare_all(self) -> None:
        is_all = False
        while not is_all:
            try:
                is_all = await self._compare_some()
            except (StoreUnavailable, StoreRefused) as error:
                # A store that cannot be written shows what is there; the next look tries again.
                logger.warning("prompts cannot be compared now: %s", error)
                return
            except Exception:
                logger.exception("prompts cannot be compared")
                return

    async def _compare_some(self) -> bool:
        found = await self._database.read(drift_index.changed)
        for rollout_id in found.rollouts:
            state, attempts = await self._compare(rollout_id)
            await self._database.write(_putting(rollout_id, state.calls, attempts))
        if found.seen is not None:
            seen = found.seen
            await self._database.write(lambda connection: drift_index.has_compared(connection, seen))
        return found.is_all

    async def _compare(self, rollout_id: str) -> tuple[State, Sequence[AttemptDrift] | None]:
        """Compare a rollout, unless it was compared just now and has no other calls since."""
        state = await self._database.read(lambda connection: drift_index.state_of(connection, rollout_id))
        latest = self._latest.get(rollout_id)
        if latest is not None and latest[0] == state:
            return latest
        attempts: Sequence[AttemptDrift] | None = None
        try:
            material = await self._database.read(lambda connection: drift.read(connection, rollout_id))
            attempts = await self._database.run(lambda: [*drift.analyse_all(material)])
        except (StoreUnavailable, StoreRefused):
            raise
        except RolloutTooLarge as error:
            logger.warning("its prompts are not compared: %s", error)
        except Exception:
            # One damaged call must not keep all others from being compared.
            logger.exception("the prompts of rollout %r cannot be compared", rollout_id)
        self._latest.pop(rollout_id, None)
        self._latest[rollout_id] = state, attempts
        for oldest in [*self._latest][:-ROLLOUTS_KEPT]:
            del self._latest[oldest]
        return state, attempts


def _putting(rollout_id: str, calls: int, attempts: Sequence[AttemptDrift] | None) -> Callable[[Connection], None]:
    return lambda connection: drift_index.put(connection, rollout_id, calls, attempts)
