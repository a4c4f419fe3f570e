"""The one interface of every store: a SQLite file, PostgreSQL, or an `agl store` over HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from agentlightning.completeness import Completeness
from agentlightning.drift import AttemptDrift
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
)
from agentlightning.sender import Progress, Sender
from agentlightning.store.filters import (
    AttemptChanges,
    DriftFilters,
    Filters,
    Listed,
    PruneFilters,
    RolloutChanges,
    SpanFilters,
    TrajectoryOptions,
    TripletFilters,
)
from agentlightning.trajectory import Trajectory
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GENERATIONS_AT_ONCE", "Store"]

GENERATIONS_AT_ONCE = 64


class Store(AbstractContextManager["Store"], ABC):
    """Rollouts, attempts, spans, resources, workers and generations, wherever they are stored.

    Methods that Agent Lightning 0.3's LightningStore has, too, have its names, but are synchronous. A store may be used
    by several threads, but not across a fork: each process opens its own.

    Raises:
        StoreUnavailable: any method, where the store cannot be reached or written now.
        StoreRefused: any method, where the store cannot be used as configured.
        InvalidRecord: any method that writes, where a value cannot be stored.
    """

    # Rollouts and the queue.

    def enqueue_rollout(
        self,
        input: Any,  # noqa: A002 -- the LightningStore's name
        *,
        mode: Mode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Rollout:
        """Append a rollout to the queue.

        Args:
            input: the task: anything that JSON can hold.
            resources_id: None for the latest resources.
            config: timeouts and retries; None for one attempt without limits.
            metadata: a JSON object.

        Example:
            >>> with open_store("run.db") as store:
            ...     store.enqueue_rollout({"question": "Paris?"}).status
            'queuing'
        """
        new = NewRollout(input, mode, resources_id, config or RolloutConfig(), metadata or {})
        return self.enqueue_rollouts([new])[0]

    @abstractmethod
    def enqueue_rollouts(self, new: Sequence[NewRollout]) -> list[Rollout]:
        """Append rollouts to the queue, in this order; all or none of them."""

    def dequeue_rollout(self, worker_id: str | None = None) -> Rollout | None:
        """Take the rollout that has been queued longest, with a new attempt.

        Args:
            worker_id: the runner that takes it, which `query_workers` then shows as busy.

        Returns:
            The rollout, which no other caller gets; None where the queue is empty.
        """
        found = self.dequeue_rollouts(1, worker_id)
        return found[0] if found else None

    @abstractmethod
    def dequeue_rollouts(self, limit: int, worker_id: str | None = None) -> list[Rollout]:
        """Take up to `limit` rollouts from the queue, those that have been queued longest."""

    @abstractmethod
    def start_rollout(
        self,
        input: Any,  # noqa: A002 -- the LightningStore's name
        *,
        mode: Mode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: Mapping[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> Rollout:
        """Create a rollout that the caller runs at once, with its first attempt."""

    @abstractmethod
    def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> Rollout:
        """Create one more attempt, whatever the state of those before.

        Raises:
            NotFound: no such rollout.
        """

    @abstractmethod
    def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Rollout]:
        """Find rollouts, each with its latest attempt; a filter that is None matches every rollout."""

    @abstractmethod
    def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """Find a rollout with its latest attempt."""

    @abstractmethod
    def update_rollout(self, rollout_id: str, **changes: Unpack[RolloutChanges]) -> Rollout:
        """Change a rollout.

        Raises:
            NotFound: no such rollout.
        """

    @abstractmethod
    def wait_for_rollouts(
        self, rollout_ids: Sequence[str], timeout: float | None = None, *, recorded: bool = False
    ) -> list[Rollout]:
        """Wait until rollouts have ended.

        Args:
            timeout: seconds; None waits until all have ended. Ids that the store does not know are not waited for.
            recorded: wait also until every vLLM server that is alive has written all that had ended by then, so that
                the calls of a rollout can be read. `completeness` tells whether any was lost.

        Returns:
            The rollouts that have ended; with `recorded`, those of them whose calls are written.
        """

    @abstractmethod
    def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        """Delete rollouts that have ended: their attempts, spans and generations, and what only these refer to.

        Generations and spans of rollouts that were never created here are deleted by the ids that they name. Writers
        and readers go on meanwhile; they may see a part of a rollout that is being deleted. Once the rollouts are gone,
        the store looks at all rows for what nothing refers to any more, so delete many rollouts at once.

        Returns:
            How many of them the store had. Repeating a call that was interrupted finishes it.

        Raises:
            RolloutUnderWay: some have not ended. The error names them, and none is deleted.
        """

    @abstractmethod
    def prune(self, *, dry_run: bool = False, **filters: Unpack[PruneFilters]) -> Iterator[Pruned]:
        """Delete all rollouts that match the filters, as `delete_rollouts` does, and then what nothing refers to.

        Without any filter no rollout is deleted, only what nothing refers to. Each step is a short transaction, and is
        done when the next result is asked for. It may be stopped at any time; another call continues.

        Args:
            dry_run: only count what would be deleted. Texts and vocabularies are not counted.

        Yields:
            After each step what was done so far; the last is the result.

        Raises:
            RolloutUnderWay: some of `rollout_ids` have not ended. The error names them, and none is deleted.

        Example:
            >>> with open_store("run.db") as store:
            ...     *_, done = store.prune(older_than=7 * 86_400, dry_run=True)
            ...     done.selected
            0
        """

    # Attempts.

    @abstractmethod
    def query_attempts(self, rollout_id: str, **listed: Unpack[Listed]) -> list[Attempt]:
        """List the attempts of a rollout."""

    def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """Find the latest attempt of a rollout."""
        found = self.get_rollout_by_id(rollout_id)
        return None if found is None else found.attempt

    @abstractmethod
    def update_attempt(self, rollout_id: str, attempt_id: str, **changes: Unpack[AttemptChanges]) -> Attempt:
        """Change an attempt; the state of the latest attempt decides the state of its rollout.

        Args:
            attempt_id: `latest` for the latest.

        Raises:
            NotFound: no such rollout or attempt.
        """

    @abstractmethod
    def heartbeat(self, rollout_id: str, attempt_id: str) -> Attempt:
        """Record a sign of life of an attempt, by the store's clock.

        Raises:
            NotFound: no such attempt.
        """

    # Spans and rewards.

    @abstractmethod
    def add_span(self, span: Span) -> Span | None:
        """Store a span of an attempt, which is a sign of life of the attempt.

        Args:
            span: its `rollout_id` and `attempt_id` are required; an absent `trace_id`, `span_id` or `sequence_id` is
                made by the store.

        Returns:
            The span as it is stored; None where it was stored before.

        Raises:
            NotFound: no such attempt.
        """

    @abstractmethod
    def query_spans(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[SpanFilters]
    ) -> list[Span]:
        """Find the spans of a rollout, or of the trace `trace_id`.

        A span that names a recorded answer has its token ids, as `prompt_token_ids` and `response_token_ids` among its
        attributes.

        Args:
            attempt_id: `latest` for the latest; None for all.
        """

    @abstractmethod
    def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """Reserve a sequence id for a span, higher than those of all stored spans of the rollout."""

    @abstractmethod
    def add_reward(self, rollout_id: str, attempt_id: str, value: float, generation_id: str | None = None) -> Span:
        """Reward an attempt or one of its calls. Of several rewards for the same, the last counts.

        Args:
            rollout_id: a rollout that was created here, or one that has only been recorded.
            attempt_id: `latest` for the latest. Of a rollout that has only been recorded, that is the attempt of the
                call that finished last, even if that call names none.
            generation_id: the call; None for the last call of the attempt, whichever that is when triplets are read.

        Returns:
            The span that holds the reward.

        Raises:
            NotFound: no such attempt or call.
        """

    # Resources and workers.

    @abstractmethod
    def add_resources(self, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        """Store resources under a new id; they are the latest from now on.

        Args:
            resources: by name, each a JSON object with its `resource_type`.
        """

    @abstractmethod
    def update_resources(self, resources_id: str, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        """Replace resources, or store them under an id of the caller's; they are the latest from now on."""

    @abstractmethod
    def get_resources_by_id(self, resources_id: str) -> Resources | None:
        """Find resources."""

    @abstractmethod
    def get_latest_resources(self) -> Resources | None:
        """Find the resources that were added or replaced last."""

    @abstractmethod
    def query_resources(
        self, *, resources_id: str | None = None, resources_id_contains: str | None = None, **listed: Unpack[Listed]
    ) -> list[Resources]:
        """List resources; a filter that is None matches all."""

    @abstractmethod
    def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Worker]:
        """List workers; a filter that is None matches all."""

    @abstractmethod
    def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """Find a worker."""

    @abstractmethod
    def update_worker(self, worker_id: str, heartbeat_stats: Mapping[str, Any] | None = None) -> Worker:
        """Record a sign of life of a worker, which may be new, with a JSON object that it reports."""

    @abstractmethod
    def statistics(self) -> dict[str, int]:
        """Count the records: `total_rollouts`, `total_attempts`, `total_spans`, `total_generations`, ..."""

    # Generations, and what is learnt from them.

    @abstractmethod
    def register_sender(self, sender: Sender) -> None:
        """Register a process that will write generations. Safe to repeat; the last call wins.

        Raises:
            InvalidRecord: no store can hold what the sender says of itself.
        """

    @abstractmethod
    def report_progress(self, sender_id: str, progress: Progress) -> int:
        """Store how far a sender has written. Safe to repeat; the last call wins.

        Returns:
            The time by the store's clock, in nanoseconds since the epoch, for the `store_time` of the next report.

        Raises:
            NotFound: the sender is not registered.
        """

    @abstractmethod
    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        """Store generations; returns how many are new.

        A generation whose id is known is left unchanged, so a caller who cannot tell whether an `add` worked repeats
        it.

        Args:
            sender_id: the process that recorded them; an unregistered one counts as none.

        Raises:
            InvalidRecord: some cannot be stored by any store, such as one whose `id` is not a UUID. The error names
                them, and all others are stored.
        """

    @abstractmethod
    def generations(
        self, at_once: int = GENERATIONS_AT_ONCE, /, *, details: bool = True, **filters: Unpack[Filters]
    ) -> Iterator[Generation]:
        """Iterate over the generations that match the filters, in the order in which they finished.

        Reading continues while the caller iterates, so that memory stays small and no writer waits. What is written
        meanwhile may be included or not.

        Args:
            at_once: how many are read together; fewer where the first of them is wanted soon.
            details: whether to read what there is for each id: logprobs, sampling masks and routed experts. They are
                the most of a generation, and None without.
        """

    @abstractmethod
    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        """Count the generations that match the filters, by status; every status is a key."""

    @abstractmethod
    def triplets(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[TripletFilters]
    ) -> Iterator[Triplet]:
        """Iterate over the triplets of a rollout, of one of its attempts, or of all rollouts.

        Rollouts follow one another in the order in which the first call of each arrived. Each is read as it is when it
        is reached. One of them that has too many calls or ids to be in memory at once is left out, with a warning in
        the log.

        Args:
            attempt_id: `latest` for the latest.

        Raises:
            NotFound: there is no call of the rollout `after`.
            RolloutTooLarge: the one rollout has more calls or ids than may be in memory at once.
        """

    @abstractmethod
    def trajectories(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **options: Unpack[TrajectoryOptions]
    ) -> Iterator[Trajectory]:
        """Iterate over the trajectories of a rollout, of one of its attempts, or of all rollouts.

        Rollouts follow one another as those of `triplets` do. An attempt that has calls, but none with ids, has no
        trajectory: the store logs a warning that says why.

        Args:
            attempt_id: `latest` for the latest.

        Raises:
            ValueError: an option has a value that makes no sense.
            NotFound: there is no call of the rollout `after`.
            RolloutTooLarge: the one rollout has more calls or ids than may be in memory at once.
        """

    @abstractmethod
    def drift(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[DriftFilters]
    ) -> Iterator[AttemptDrift]:
        """Iterate over the drift of a rollout's attempts, of one of them, or of those of all rollouts.

        Rollouts follow one another as those of `triplets` do.

        Args:
            attempt_id: `latest` for the latest.

        Raises:
            NotFound: there is no call of the rollout `after`.
        """

    @abstractmethod
    def completeness(self, rollout_id: str, attempt_id: str | None = None) -> Completeness:
        """Tell whether a rollout, or one of its attempts, has ended and all of its calls are stored, or why not.

        Args:
            attempt_id: `latest` for the latest; None for the rollout.
        """

    @abstractmethod
    def add_losses(self, losses: Sequence[Loss]) -> None:
        """Store reports of generations that could not be stored: all or none, each once, as `add` does."""

    @abstractmethod
    def losses(self) -> Iterator[Loss]:
        """Iterate over the reports of losses, in the order in which they were stored."""

    @abstractmethod
    def close(self) -> None:
        """Close the store. Idempotent."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
