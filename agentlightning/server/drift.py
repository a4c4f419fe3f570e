"""The index of drift, brought up to date by whoever looks at it."""

from __future__ import annotations

from contextlib import suppress

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.server.transactions import Transactions
from agentlightning.store import drift_index

__all__ = ["SECONDS_OF_A_LOOK", "look"]

SECONDS_OF_A_LOOK = 0.2
"""How long a request compares rollouts at most, except for one that takes longer."""


async def look(database: Transactions, seconds: float = SECONDS_OF_A_LOOK) -> bool:
    """Compare rollouts with new calls for a while; tells whether all of them are compared now."""
    # A store that cannot be written shows what is there.
    with suppress(StoreUnavailable, StoreRefused):
        compared = await database.read(lambda connection: drift_index.compare(connection, seconds))
        if compared.rollouts or compared.seen is not None:
            await database.write(lambda connection: drift_index.put(connection, compared))
        return compared.is_all
    return False
