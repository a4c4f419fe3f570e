"""What `open_store` gives for a database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss, Status
from agentlightning.sender import Sender
from agentlightning.store import Filters, Store, rollouts, senders, triplets
from agentlightning.store import generations as kept
from agentlightning.store.database import Database
from agentlightning.store.rows import storable
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DatabaseStore"]

ROWS_AT_ONCE = 64


class DatabaseStore(Store):
    """Generations in a database.

    Args:
        database: is closed with the store.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def greet(self, sender: Sender) -> None:
        self._database.write(lambda connection: senders.greet(connection, sender))

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        try:
            return self._database.write(lambda connection: kept.add(connection, generations, sender_id))
        except (StoreUnavailable, StoreRefused):
            raise
        except Exception:
            # One of them is at fault: found in a second transaction, so that the usual one stays as quick as it is.
            new, reasons = self._database.write(
                lambda connection: kept.add_valid(connection, generations, sender_id, self._database.explanation)
            )
        if reasons:
            raise InvalidRecord(reasons, new)
        return new

    def generations(self, **filters: Unpack[Filters]) -> Iterator[Generation]:
        end = None
        while True:
            # A transaction a page: one that is open for long keeps SQLite from emptying the WAL file.
            with self._database.reading() as connection:
                found, end = kept.page(connection, filters, end, ROWS_AT_ONCE)
            yield from found
            if end is None:
                return

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        with self._database.reading() as connection:
            return kept.tally(connection, filters)

    def add_losses(self, losses: Sequence[Loss]) -> None:
        self._database.write(lambda connection: kept.add_losses(connection, losses))

    def losses(self) -> Iterator[Loss]:
        with self._database.reading() as connection:
            found = list(kept.losses(connection))
        yield from found

    def rollout_status(self, rollout_id: str) -> str | None:
        with self._database.reading() as connection:
            found = rollouts.find(connection, storable(rollout_id) or "")
        return None if found is None else found.status

    def triplets(self, rollout_id: str | None = None, attempt_id: str | None = None) -> Iterator[Triplet]:
        rollout_ids = [] if rollout_id is None else [rollout_id]
        if rollout_id is None:
            with self._database.reading() as connection:
                rollout_ids = triplets.rollouts_of(connection)
        for each in rollout_ids:
            with self._database.reading() as connection:
                found = triplets.of_rollout(connection, each, attempt_id)
            yield from found

    def close(self) -> None:
        self._database.close()
