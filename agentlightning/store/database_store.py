"""The store in a database: SQLite or PostgreSQL."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import Connection

from agentlightning.completeness import Completeness
from agentlightning.drift import AttemptDrift
from agentlightning.errors import InvalidRecord, NotFound, RolloutTooLarge, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss, Status
from agentlightning.rollout_records import (
    Attempt,
    Mode,
    NewRollout,
    Pruned,
    Resources,
    Rollout,
    RolloutConfig,
    RolloutStatus,
    Span,
    Worker,
    WorkerStatus,
    record_from,
    with_ids,
)
from agentlightning.sender import Progress, Sender
from agentlightning.store import completeness as completeness_rows
from agentlightning.store import (
    deletion,
    health,
    ingestion,
    lifecycle,
    pages,
    pruning,
    rollouts,
    senders,
    spans,
    workers,
)
from agentlightning.store import drift as drift_rows
from agentlightning.store import generations as generation_rows
from agentlightning.store import resources as resource_rows
from agentlightning.store import trajectories as trajectory_rows
from agentlightning.store import triplets as triplet_rows
from agentlightning.store.completeness import Endings, endings
from agentlightning.store.database import Database
from agentlightning.store.filters import (
    AttemptChanges,
    DriftFilters,
    Filters,
    Listed,
    PruneFilters,
    RolloutChanges,
    RolloutPage,
    SpanFilters,
    TrajectoryOptions,
    TripletFilters,
)
from agentlightning.store.interface import GENERATIONS_AT_ONCE, Store
from agentlightning.store.pages import Listing
from agentlightning.store.rows import storable
from agentlightning.trajectory import AttemptCalls, Trajectory, check_options
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DatabaseStore"]

SHORTEST_NAP, LONGEST_NAP = 0.02, 0.5

T = TypeVar("T")

logger = logging.getLogger("agentlightning.store")


class DatabaseStore(Store):
    """A store in a database.

    Attempts that have timed out are ended before anything is read or written, so no caller sees one that should have
    ended; except of a database that is opened for reading only, which shows what it has.

    Args:
        database: is closed with the store.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def enqueue_rollouts(self, new: Sequence[NewRollout]) -> list[Rollout]:
        def work(connection: Connection) -> list[Rollout]:
            return [self._rollout(row) for row in rollouts.find_all(connection, lifecycle.enqueue(connection, new))]

        return self._write(work)

    def dequeue_rollouts(self, limit: int, worker_id: str | None = None) -> list[Rollout]:
        def work(connection: Connection) -> list[Rollout]:
            return [self._rollout(row) for row in lifecycle.dequeue(connection, limit, worker_id)]

        return self._write(work)

    def start_rollout(
        self,
        input: Any,  # noqa: A002
        *,
        mode: Mode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: Mapping[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> Rollout:
        new = NewRollout(input, mode, resources_id, config or RolloutConfig(), metadata or {})
        [row] = self._write(lambda connection: lifecycle.start_all(connection, [lifecycle.Start(new, worker_id)]))
        return self._rollout(row)

    def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> Rollout:
        def work(connection: Connection) -> Rollout:
            lifecycle.start_attempt(connection, rollout_id, worker_id)
            return self._rollout(rollouts.find(connection, rollout_id))

        return self._write(work)

    def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Rollout]:
        found = rollouts.listing(status_in, rollout_id_in, rollout_id_contains, filter_logic)
        return [self._rollout(row) for row in self._listed(found, listed)]

    def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        row = self._read(lambda connection: rollouts.find(connection, storable(rollout_id) or ""))
        return None if row is None else self._rollout(row)

    def update_rollout(self, rollout_id: str, **changes: Unpack[RolloutChanges]) -> Rollout:
        def work(connection: Connection) -> Rollout:
            lifecycle.update_rollout(connection, rollout_id, changes)
            return self._rollout(rollouts.find(connection, rollout_id))

        return self._write(work)

    def wait_for_rollouts(
        self, rollout_ids: Sequence[str], timeout: float | None = None, *, recorded: bool = False
    ) -> list[Rollout]:
        ends = None if timeout is None else time.monotonic() + timeout
        wanted = list(dict.fromkeys(rollout_ids))
        nap = SHORTEST_NAP
        found: Endings | None = None
        while True:
            found = self._read(lambda connection, found=found: endings(connection, wanted, recorded, found))
            if found.are_all or (ends is not None and time.monotonic() >= ends):
                break
            time.sleep(nap if ends is None else max(0.0, min(nap, ends - time.monotonic())))
            nap = min(2 * nap, LONGEST_NAP)
        ended = found.ended
        return [self._rollout(row) for row in self._read(lambda connection: rollouts.find_all(connection, ended))]

    def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        found = deletion.select(self._database, rollout_ids=rollout_ids)
        deleted = sum(deletion.delete(self._database, found), Counter[str]())
        if deleted:
            for _ in deletion.finish(self._database):
                pass
        return deleted["rollouts"]

    def prune(self, *, dry_run: bool = False, **filters: Unpack[PruneFilters]) -> Iterator[Pruned]:
        return pruning.prune(self._database, filters, dry_run=dry_run)

    def query_attempts(self, rollout_id: str, **listed: Unpack[Listed]) -> list[Attempt]:
        found = self._listed(rollouts.attempt_listing(rollout_id), {"sort_by": "sequence_id", **listed})
        return [self._attempt(row, rollout_id) for row in found]

    def update_attempt(self, rollout_id: str, attempt_id: str, **changes: Unpack[AttemptChanges]) -> Attempt:
        row = self._write(lambda connection: lifecycle.update_attempt(connection, rollout_id, attempt_id, changes))
        return self._attempt(row, rollout_id)

    def heartbeat(self, rollout_id: str, attempt_id: str) -> Attempt:
        def work(connection: Connection) -> Any:
            if not lifecycle.heartbeat(connection, rollout_id, attempt_id):
                raise NotFound(f"the rollout {rollout_id!r} has no attempt {attempt_id!r}")
            return rollouts.find_attempt(connection, rollout_id, attempt_id)

        return self._attempt(self._write(work), rollout_id)

    def add_span(self, span: Span) -> Span | None:
        new = spans.new_span(with_ids(span.as_dict()))
        [stored] = self._write(lambda connection: ingestion.add_spans(connection, [new]))
        return None if stored is None else _span(stored)

    def query_spans(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[SpanFilters]
    ) -> list[Span]:
        wanted: dict[str, Any] = dict(filters)
        listed: Any = {"sort_by": "sequence_id"}
        listed |= {name: wanted.pop(name) for name in Listed.__annotations__ if name in wanted}
        found = spans.listing(rollout_id, attempt_id, **wanted)
        return [_span(row) for row in self._listed(found, listed)]

    def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        return self._write(lambda connection: spans.next_sequence_ids(connection, rollout_id))[0]

    def add_reward(self, rollout_id: str, attempt_id: str, value: float, generation_id: str | None = None) -> Span:
        return _span(
            self._write(
                lambda connection: ingestion.add_reward(connection, rollout_id, attempt_id, value, generation_id)
            )
        )

    def add_resources(self, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        return _resources(self._write(lambda connection: resource_rows.add(connection, resources)))

    def update_resources(self, resources_id: str, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        return _resources(self._write(lambda connection: resource_rows.put(connection, resources_id, resources)))

    def get_resources_by_id(self, resources_id: str) -> Resources | None:
        row = self._read(lambda connection: resource_rows.find(connection, resources_id))
        return None if row is None else _resources(row)

    def get_latest_resources(self) -> Resources | None:
        row = self._read(lambda connection: resource_rows.find(connection, resource_rows.latest_id(connection)))
        return None if row is None else _resources(row)

    def query_resources(
        self, *, resources_id: str | None = None, resources_id_contains: str | None = None, **listed: Unpack[Listed]
    ) -> list[Resources]:
        found = resource_rows.listing(resources_id, resources_id_contains)
        return [_resources(row) for row in self._listed(found, listed)]

    def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Worker]:
        found = workers.listing(status_in, worker_id_contains, filter_logic)
        return [_worker(row) for row in self._listed(found, listed)]

    def get_worker_by_id(self, worker_id: str) -> Worker | None:
        row = self._read(lambda connection: workers.find(connection, worker_id))
        return None if row is None else _worker(row)

    def update_worker(self, worker_id: str, heartbeat_stats: Mapping[str, Any] | None = None) -> Worker:
        return _worker(self._write(lambda connection: workers.heartbeat(connection, worker_id, heartbeat_stats)))

    def statistics(self) -> dict[str, int]:
        return self._read(health.count)

    def register_sender(self, sender: Sender) -> None:
        self._database.write(lambda connection: senders.register(connection, sender))

    def report_progress(self, sender_id: str, progress: Progress) -> int:
        return self._database.write(lambda connection: senders.report_progress(connection, sender_id, progress))

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        try:
            return self._database.write(lambda connection: generation_rows.add(connection, generations, sender_id))
        except (StoreUnavailable, StoreRefused):
            raise
        except Exception:
            # One of them is at fault. It is isolated in a second transaction, which keeps the usual one fast.
            added = self._database.write(
                lambda connection: generation_rows.add_valid(
                    connection, generations, sender_id, self._database.explanation
                )
            )
        if added.refused:
            raise InvalidRecord(added.refused, added.new)
        return added.new

    def generations(
        self, at_once: int = GENERATIONS_AT_ONCE, /, *, details: bool = True, **filters: Unpack[Filters]
    ) -> Iterator[Generation]:
        end = None
        while True:
            # A transaction for each page: a long one would keep SQLite from emptying its WAL file.
            with self._database.reading() as connection:
                found, end = generation_rows.page(connection, filters, end, at_once, details)
            yield from found
            if end is None:
                return

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        with self._database.reading() as connection:
            return generation_rows.tally(connection, filters)

    def triplets(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[TripletFilters]
    ) -> Iterator[Triplet]:
        def read(connection: Connection, each: str) -> list[Triplet]:
            return triplet_rows.of_rollout(connection, each, attempt_id, filters)

        for found in self._of_rollouts(rollout_id, filters, read):
            yield from found

    def trajectories(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **options: Unpack[TrajectoryOptions]
    ) -> Iterator[Trajectory]:
        check_options(options)
        return self._trajectories(rollout_id, attempt_id, options)

    def _trajectories(
        self, rollout_id: str | None, attempt_id: str | None, options: TrajectoryOptions
    ) -> Iterator[Trajectory]:
        def read(connection: Connection, each: str) -> list[AttemptCalls]:
            return trajectory_rows.attempts_of(connection, each, attempt_id)

        for attempts in self._of_rollouts(rollout_id, options, read):
            yield from trajectory_rows.merge_all(attempts, options)[0]

    def drift(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[DriftFilters]
    ) -> Iterator[AttemptDrift]:
        def read(connection: Connection, each: str) -> drift_rows.Material:
            return drift_rows.read(connection, each, attempt_id)

        for material in self._of_rollouts(rollout_id, filters, read):
            yield from drift_rows.analyse_all(material, filters.get("model"))

    def _of_rollouts(
        self, rollout_id: str | None, page: RolloutPage, read: Callable[[Connection, str], T]
    ) -> Iterator[T]:
        """Read one rollout, or one after the other. Among several, one that is too large is left out, and logged."""
        if rollout_id is not None:
            with self._database.reading() as connection:
                found = read(connection, rollout_id)
            yield found
            return
        with self._database.reading() as connection:
            rollout_ids = triplet_rows.rollouts_of(
                connection, since=page.get("since"), after=page.get("after"), limit=page.get("limit")
            )
        for each in rollout_ids:
            try:
                with self._database.reading() as connection:
                    found = read(connection, each)
            except RolloutTooLarge as error:
                logger.warning("%s", error)
                continue
            yield found

    def completeness(self, rollout_id: str, attempt_id: str | None = None) -> Completeness:
        return self._read(lambda connection: completeness_rows.of_rollout(connection, rollout_id, attempt_id))

    def add_losses(self, losses: Sequence[Loss]) -> None:
        self._database.write(lambda connection: generation_rows.add_losses(connection, losses))

    def losses(self) -> Iterator[Loss]:
        with self._database.reading() as connection:
            found = list(generation_rows.losses(connection))
        yield from found

    def close(self) -> None:
        self._database.close()

    def _read(self, work: Callable[[Connection], T]) -> T:
        with self._database.reading() as connection:
            if self._database.is_read_only or not lifecycle.is_anything_due(connection):
                return work(connection)
        try:
            return self._write(work)
        except (StoreUnavailable, StoreRefused):
            # A database that only reads, or a reader without the right to write, shows what is there.
            with self._database.reading() as connection:
                return work(connection)

    def _write(self, work: Callable[[Connection], T]) -> T:
        def expire_first(connection: Connection) -> T:
            if lifecycle.is_anything_due(connection):
                lifecycle.expire(connection)
            return work(connection)

        return self._database.write(expire_first)

    def _listed(self, listing: Listing, listed: Listed) -> list[Any]:
        def work(connection: Connection) -> list[Any]:
            descending = listed.get("sort_order", "asc") == "desc"
            limit, offset = listed.get("limit", -1), listed.get("offset", 0)
            page = listing.page(connection, listed.get("sort_by"), descending, limit, offset)
            return [row for keys in pages.parts(page.keys) for row in listing.rows(connection, keys)]

        return self._read(work)

    def _rollout(self, row: Any) -> Rollout:
        return record_from(Rollout, rollouts.rollout_fields(row), self)

    def _attempt(self, row: Any, rollout_id: str) -> Attempt:
        return record_from(Attempt, rollouts.attempt_fields(row, rollout_id), self)


def _resources(row: Any) -> Resources:
    return record_from(Resources, resource_rows.resources_fields(row))


def _worker(row: Any) -> Worker:
    return record_from(Worker, workers.worker_fields(row))


def _span(row: Any) -> Span:
    return record_from(Span, json.loads(spans.span_json(row)))
