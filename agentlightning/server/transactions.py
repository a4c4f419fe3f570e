"""Transactions of the server: the writes of many requests in one transaction, and reads beside it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.rollout_records import Pruned
from agentlightning.store import deletion, lifecycle, pruning, summaries
from agentlightning.store.database import Conflict, Database, savepoint
from agentlightning.store.filters import PruneFilters

__all__ = ["Busy", "Transactions"]

T = TypeVar("T")
Item = TypeVar("Item")
Work = Callable[[Connection], T]
WorkTogether = Callable[[Connection, Sequence[Item]], Sequence[T]]
"""Writes several items, and returns the outcome of each; raises if one of them cannot be written."""

WRITES_AT_ONCE = 256
WRITES_WAITING = 10_000
READERS = 2
SECONDS_BETWEEN_SWEEPS = 1.0
SECONDS_BETWEEN_SEARCHES = 60.0
"""At least so long between two searches for what deleted rollouts have left: each reads all rows."""
SECONDS_OF_SILENCE = 5.0
"""Clients and proxies take a server that says nothing for longer as gone."""

logger = logging.getLogger("agentlightning.store")


class Busy(StoreUnavailable):
    """More writes wait than the server holds; the client should retry later."""


@dataclass(slots=True)
class _Write:
    work: WorkTogether[Any, Any]
    item: Any
    future: asyncio.Future[Any]
    outcome: Any = None
    error: BaseException | None = None


class Transactions:
    """Transactions on a database, for the event loop in which this object is made.

    A write is answered when it is committed. Writes that wait during a commit are committed together, so that a disk
    keeps up with an in-memory store; a write that raises is rolled back alone. For that, all are rolled back and run
    again, each in a savepoint: this is rare, and savepoints for all would cost more than it.

    Attempts that have timed out are ended before anything is read or written, so no client sees one that should have
    ended.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._writes: SimpleQueue[_Write | None] = SimpleQueue()
        self._waiting = 0
        self._readers = ThreadPoolExecutor(READERS, "agl-store-read")
        self._writer = threading.Thread(target=self._write_all, name="agl-store-write", daemon=True)
        self._writer.start()
        # One deletes what deleted rollouts have left while the other deletes rollouts.
        self._deleters = ThreadPoolExecutor(2, "agl-store-delete")
        self._is_closing = self._has_deleted = False
        self._sweeper = asyncio.create_task(self._sweep())
        self._finisher = asyncio.create_task(self._finish_deletions())

    @property
    def waiting(self) -> int:
        """Number of writes that have not been committed."""
        return self._waiting

    def explanation(self, error: Exception) -> Exception | None:
        """Translate an error of the driver; see `Database.explanation`."""
        return self._database.explanation(error)

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a read transaction of its own and return its result.

        Raises:
            StoreUnavailable: the store cannot be read now.
        """
        looks_for_due = True
        while True:
            is_due, found = await self._loop.run_in_executor(self._readers, self._read, work, looks_for_due)
            if not is_due:
                return found
            # If there is nothing to end after all, another server is ending it.
            looks_for_due = bool(await self.write(lifecycle.expire))

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a write transaction and return its result once it is committed.

        Raises:
            Busy: too many writes wait.
            StoreUnavailable: the store cannot be written now; nothing of this write is stored.
        """
        return await self.write_together(lambda connection, _: [work(connection)], None)

    async def write_together(self, work: WorkTogether[Item, T], item: Item) -> T:
        """Run `work` in a write transaction for this item and those that wait beside it, and return its outcome.

        Raises:
            Busy: too many writes wait.
            StoreUnavailable: the store cannot be written now; nothing of this write is stored.
        """
        if self._waiting >= WRITES_WAITING:
            raise Busy(f"{self._waiting} writes wait already")
        self._waiting += 1
        write = _Write(work, item, self._loop.create_future())
        self._writes.put(write)
        return await write.future

    async def delete(self, rollout_id: str) -> bool:
        """Delete a rollout that has ended; False where no record names it.

        What nothing refers to any more is deleted later, for all deleted rollouts at once: that looks at all rows.

        Raises:
            RolloutUnderWay: it has not ended.
        """
        return await self._loop.run_in_executor(self._deleters, self._delete, rollout_id)

    async def prune(self, filters: PruneFilters, *, dry_run: bool) -> AsyncIterator[Pruned]:
        """Delete as `Store.prune` does; while a step takes long, the state before it is repeated."""
        steps = pruning.prune(self._database, filters, dry_run=dry_run)
        found, is_done = None, False
        try:
            while True:
                step = self._loop.run_in_executor(self._deleters, next, steps, None)
                while found is not None and not (await asyncio.wait({step}, timeout=SECONDS_OF_SILENCE))[0]:
                    yield found
                found = await step
                if found is None:
                    is_done = True
                    return
                yield found
        finally:
            if not is_done and not dry_run:
                self._has_deleted = True

    async def refresh_summaries(self) -> bool:
        """Make the summaries of some rollouts that changed, in a transaction; tells whether these were all."""
        return await self._loop.run_in_executor(self._readers, summaries.refresh, self._database)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work`, which needs no database, in a thread, so that it does not block the event loop."""
        return await self._loop.run_in_executor(self._readers, work)

    async def close(self) -> None:
        """Commit the writes that wait, and stop."""
        self._sweeper.cancel()
        self._finisher.cancel()
        self._is_closing = True
        self._writes.put(None)
        await self._loop.run_in_executor(None, self._writer.join)
        self._readers.shutdown()
        await self._loop.run_in_executor(None, self._deleters.shutdown)

    def _read(self, work: Work[Any], looks_for_due: bool) -> tuple[bool, Any]:
        """Return whether an attempt is overdue, and the result of `work` if none is."""
        with self._database.reading() as connection:
            if looks_for_due and lifecycle.is_anything_due(connection):
                return True, None
            return False, work(connection)

    def _delete(self, rollout_id: str) -> bool:
        deleted = Counter[str]()
        for some in deletion.delete(self._database, deletion.select(self._database, rollout_ids=[rollout_id])):
            self._has_deleted = True
            deleted += some
        return bool(deleted)

    def _finish_deletion(self) -> None:
        if not self._has_deleted:
            return
        self._has_deleted = False
        try:
            for _ in deletion.finish(self._database):
                if self._is_closing:
                    return
        except BaseException:
            self._has_deleted = True
            raise

    def _write_all(self) -> None:
        while (first := self._writes.get()) is not None:
            batch, ends = [first], False
            while len(batch) < WRITES_AT_ONCE:
                try:
                    more = self._writes.get_nowait()
                except Empty:
                    break
                if more is None:
                    ends = True
                    break
                batch.append(more)
            self._commit(batch)
            self._loop.call_soon_threadsafe(self._answer, batch)
            if ends:
                return

    def _commit(self, batch: list[_Write]) -> None:
        together: dict[WorkTogether[Any, Any], list[_Write]] = {}
        for write in batch:
            together.setdefault(write.work, []).append(write)
        try:
            with self._begun() as connection:
                for work, writes in together.items():
                    outcomes = work(connection, [each.item for each in writes])
                    for write, outcome in zip(writes, outcomes, strict=True):
                        write.outcome = outcome
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, (StoreUnavailable, StoreRefused)):
                self._commit_apart(batch)
            else:
                self._resolve(batch, error)

    def _commit_apart(self, batch: list[_Write]) -> None:
        """Commit writes together, of which some raise."""
        try:
            with self._begun() as connection:
                for write in batch:
                    self._do(connection, write)
        except Exception as error:
            self._resolve(batch, error)

    def _resolve(self, batch: list[_Write], error: Exception) -> None:
        """Answer a batch that was rolled back with the error, or commit each write alone."""
        for write in batch:
            write.error = error
            if isinstance(error, Conflict):
                # Other servers write to the same database, and locked the same rows in another order.
                self._commit_alone(write)

    @contextmanager
    def _begun(self) -> Iterator[Connection]:
        with self._database.writing() as connection:
            if lifecycle.is_anything_due(connection):
                lifecycle.expire(connection)
            yield connection

    def _commit_alone(self, write: _Write) -> None:
        write.error = None
        try:
            [write.outcome] = self._database.write(lambda connection: write.work(connection, [write.item]))
        except Exception as error:
            write.error = error

    def _do(self, connection: Connection, write: _Write) -> None:
        try:
            with savepoint(connection):
                [write.outcome] = write.work(connection, [write.item])
        except Exception as error:
            meaning = self._database.explanation(error) or error
            # An error of the database concerns the whole batch; an error in a value concerns its sender alone.
            if isinstance(meaning, (StoreUnavailable, StoreRefused)):
                raise
            write.error = meaning

    def _answer(self, batch: list[_Write]) -> None:
        self._waiting -= len(batch)
        for write in batch:
            if write.future.cancelled():
                continue
            if write.error is None:
                write.future.set_result(write.outcome)
            else:
                write.future.set_exception(write.error)

    async def _sweep(self) -> None:
        """End overdue attempts without any request, so that a retried rollout shows in the metrics.

        Also release disk space that a reader kept from being released before.
        """
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SWEEPS)
            try:
                await self.read(lambda _: None)
                await self.run(self._database.tidy)
            except (StoreUnavailable, StoreRefused) as error:
                logger.warning("overdue attempts cannot be ended now: %s", error)
            except Exception:
                # The loop continues: the next round may succeed.
                logger.exception("overdue attempts cannot be ended")

    async def _finish_deletions(self) -> None:
        """Delete what nothing refers to any more after rollouts were deleted, and give its space back."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SEARCHES)
            try:
                await self._loop.run_in_executor(self._deleters, self._finish_deletion)
            except (StoreUnavailable, StoreRefused) as error:
                logger.warning("what deleted rollouts have left cannot be deleted now: %s", error)
            except Exception:
                # The loop continues: the next round may succeed.
                logger.exception("what deleted rollouts have left cannot be deleted")
