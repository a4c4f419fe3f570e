"""Rollouts, attempts, spans, resources and workers: the records of a LightningStore, as plain types.

Field names and states are those of Agent Lightning 0.3. Times are seconds since the epoch, by the store's clock where
the store sets them. A record that a store returned knows that store, so that a program can act on it directly:

    rollout = store.dequeue_rollout(worker_id="runner-1")
    rollout.reward(1.0)
    rollout.finish("succeeded")
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args
from urllib.parse import quote

from agentlightning.sampling import Pins, pins_for, text_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from agentlightning.generation import Generation
    from agentlightning.store import Store
    from agentlightning.store.filters import (
        TrajectoryOptions,
        TripletFilters,
    )
    from agentlightning.trajectory import Trajectory
    from agentlightning.triplet import Triplet

__all__ = [
    "ATTEMPT_STATUSES",
    "FINISHED",
    "MODES",
    "ROLLOUT_STATUSES",
    "Attempt",
    "AttemptStatus",
    "Mode",
    "NewRollout",
    "Pruned",
    "Record",
    "Resources",
    "Rollout",
    "RolloutConfig",
    "RolloutStatus",
    "Span",
    "Worker",
    "WorkerStatus",
    "record_from",
    "with_ids",
]

Mode = Literal["train", "val", "test"]
RolloutStatus = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
WorkerStatus = Literal["idle", "busy", "unknown"]
MODES: Sequence[Mode | None] = (*get_args(Mode), None)
ROLLOUT_STATUSES: Sequence[RolloutStatus] = get_args(RolloutStatus)
ATTEMPT_STATUSES: Sequence[AttemptStatus] = get_args(AttemptStatus)
FINISHED: Sequence[RolloutStatus] = ("failed", "succeeded", "cancelled")
"""The states in which a rollout has ended."""

Record = TypeVar("Record", "Attempt", "Rollout", "Span", "Resources", "Worker")


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """Limits by which an attempt fails, and whether another one follows.

    Attributes:
        timeout_seconds: longest duration of an attempt; None for no limit.
        unresponsive_seconds: longest time without a heartbeat or a span of an attempt; None for no limit.
        max_attempts: number of attempts, the first included.
        retry_condition: states of an attempt after which another one is queued.
        sampling: sampling parameters that a server with `AGL_SAMPLING` pins for its calls, such as
            `{"temperature": 0.6}`; `"client"` for those that its agent asks for; None for those of its resources, or
            the server's.
    """

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: Sequence[AttemptStatus] = ()
    sampling: Mapping[str, Any] | str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without `sampling` if there is none, as a LightningStore has them."""
        found = asdict(self)
        if self.sampling is None:
            del found["sampling"]
        return found


@dataclass(frozen=True, slots=True)
class NewRollout:
    """A rollout that is to be created.

    Attributes:
        input: the task: anything that JSON can hold.
        resources_id: None for the latest resources.
        metadata: a JSON object.
    """

    input: Any
    mode: Mode | None = None
    resources_id: str | None = None
    config: RolloutConfig = RolloutConfig()
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


class _Portable:
    """A record that can be copied, pickled and turned into JSON; its store stays behind, which holds connections."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {name: _plain(value) for name, value in self.__getstate__().items() if name != "store"}

    def __getstate__(self) -> dict[str, Any]:
        record: Any = self
        return {each.name: None if each.name == "store" else getattr(self, each.name) for each in fields(record)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass(slots=True)
class Attempt(_Portable):
    """One try at a rollout.

    Attributes:
        sequence_id: 1 for the first attempt.
        last_heartbeat_time: when the store last received a heartbeat or a span of this attempt.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float
    end_time: float | None = None
    status: AttemptStatus = "preparing"
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: dict[str, Any] | None = None
    store: Store | None = field(default=None, repr=False, compare=False)

    def heartbeat(self) -> None:
        """Tell the store that this attempt is alive.

        Raises:
            NotFound: the store has no such attempt.
        """
        changed = _store_of(self).heartbeat(self.rollout_id, self.attempt_id)
        self.status, self.last_heartbeat_time = changed.status, changed.last_heartbeat_time

    def reward(self, value: float, generation_id: str | None = None) -> None:
        """Reward this attempt; see `Store.add_reward`."""
        _store_of(self).add_reward(self.rollout_id, self.attempt_id, value, generation_id)

    def finish(self, status: AttemptStatus = "succeeded") -> None:
        """End this attempt; the state of the latest attempt decides the state of its rollout."""
        changed = _store_of(self).update_attempt(self.rollout_id, self.attempt_id, status=status)
        self.status, self.end_time = changed.status, changed.end_time

    def triplets(self, **filters: Unpack[TripletFilters]) -> Iterator[Triplet]:
        """Iterate over the triplets of this attempt, in order; see `Store.triplets`."""
        return _store_of(self).triplets(self.rollout_id, self.attempt_id, **filters)

    def trajectories(self, **options: Unpack[TrajectoryOptions]) -> Iterator[Trajectory]:
        """Iterate over the trajectories of this attempt, in order; see `Store.trajectories`."""
        return _store_of(self).trajectories(self.rollout_id, self.attempt_id, **options)


@dataclass(slots=True)
class Rollout(_Portable):
    """A task, and what has become of it.

    Attributes:
        input: the task, as it was enqueued.
        attempt: the latest attempt; None while there is none.
    """

    rollout_id: str
    input: Any
    start_time: float
    end_time: float | None = None
    mode: Mode | None = None
    resources_id: str | None = None
    status: RolloutStatus = "queuing"
    config: RolloutConfig = field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None
    attempt: Attempt | None = None
    store: Store | None = field(default=None, repr=False, compare=False)

    def base_url(self, server: str) -> str:
        """Return the base URL with which an OpenAI client's calls are recorded under this rollout and its attempt.

        It also has the sampling parameters that its config or its resources pin.

        Args:
            server: URL of the vLLM server, such as `http://localhost:8000`; a trailing `/v1` is accepted.

        Raises:
            ValueError: these parameters are not valid.
        """
        root = server.rstrip("/").removesuffix("/v1")
        path = f"/rollout/{quote(self.rollout_id, safe='')}"
        if self.attempt is not None:
            path += f"/attempt/{quote(self.attempt.attempt_id, safe='')}"
        if (pins := self._pins()) is not None:
            path += f"/sampling/{quote(text_of(pins), safe='=,')}"
        return f"{root}{path}/v1"

    def api_key(self, key: str = "none") -> str:
        """Return the API key with which a client's calls are recorded under this rollout and its attempt.

        It has what `base_url` has. It is for agents that take a key, and no base URL with a path, or stand behind a
        router.

        Args:
            key: the key of the vLLM server; any text for a server without one.

        Raises:
            ValueError: the sampling parameters that are to be pinned are not valid.
        """
        named = f"{key}@rollout={quote(self.rollout_id, safe='')}"
        if self.attempt is not None:
            named += f",attempt={quote(self.attempt.attempt_id, safe='')}"
        if (pins := self._pins()) is not None:
            named += f",sampling={quote(text_of(pins), safe='')}"
        return named

    def _pins(self) -> Pins | None:
        """Find the sampling parameters that are to be pinned: those of the config, or else of the resources."""
        wanted = self.config.sampling
        if wanted is None and self.resources_id is not None and self.store is not None:
            found = self.store.get_resources_by_id(self.resources_id)
            named = () if found is None else found.resources.values()
            wanted = next((each["sampling"] for each in named if each.get("sampling") is not None), None)
        try:
            return pins_for(wanted, self.mode)
        except ValueError as error:
            raise ValueError(f"the sampling of rollout {self.rollout_id!r} is not valid: {error}") from error

    def reward(self, value: float, generation_id: str | None = None) -> None:
        """Reward the attempt that this object holds, or else the latest one; see `Store.add_reward`."""
        _store_of(self).add_reward(self.rollout_id, self._attempt_id, value, generation_id)

    def finish(self, status: Literal["succeeded", "failed"] = "succeeded") -> None:
        """End the attempt that this object holds, and with it the rollout unless its config asks for another attempt.

        Raises:
            NotFound: the rollout has no attempt.
        """
        store = _store_of(self)
        changed = store.update_attempt(self.rollout_id, self._attempt_id, status=status)
        if self.attempt is not None:
            self.attempt.status, self.attempt.end_time = changed.status, changed.end_time
        current = store.get_rollout_by_id(self.rollout_id)
        if current is not None:
            self.status, self.end_time = current.status, current.end_time

    def triplets(self, **filters: Unpack[TripletFilters]) -> Iterator[Triplet]:
        """Iterate over the triplets of this rollout, in order; see `Store.triplets`."""
        return _store_of(self).triplets(self.rollout_id, **filters)

    def trajectories(self, **options: Unpack[TrajectoryOptions]) -> Iterator[Trajectory]:
        """Iterate over the trajectories of this rollout, in order; see `Store.trajectories`."""
        return _store_of(self).trajectories(self.rollout_id, **options)

    def generations(self) -> Iterator[Generation]:
        """Iterate over the generations that were recorded under this rollout's id, in the order they finished."""
        return _store_of(self).generations(rollout_id=self.rollout_id)

    @property
    def _attempt_id(self) -> str:
        return "latest" if self.attempt is None else self.attempt.attempt_id


@dataclass(slots=True)
class Span:
    """A span of OpenTelemetry, with the rollout that it belongs to.

    Attributes:
        rollout_id: None, as `attempt_id`, for a span that an exporter sent without a rollout.
        sequence_id: position among the spans of its rollout; None lets the store number it.
        status: `{"status_code": "UNSET" | "OK" | "ERROR", "description": text or None}`.
        context: `{"trace_id", "span_id", "is_remote", "trace_state"}`, as `parent` has them; None where unknown.
        resource: `{"attributes", "schema_url"}`.
    """

    name: str
    rollout_id: str | None = None
    attempt_id: str | None = None
    sequence_id: int | None = None
    trace_id: str = ""
    span_id: str = ""
    parent_id: str | None = None
    status: dict[str, Any] = field(default_factory=lambda: {"status_code": "OK", "description": None})
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    links: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    start_time: float | None = None
    end_time: float | None = None
    context: dict[str, Any] | None = None
    parent: dict[str, Any] | None = None
    resource: dict[str, Any] = field(default_factory=lambda: {"attributes": {}, "schema_url": ""})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(slots=True)
class Resources:
    """A version of the resources that runners work with.

    Attributes:
        version: 1 for the first; one more each time they are replaced.
        resources: by name, each a JSON object with its `resource_type` (`llm`, `proxy_llm` or `prompt_template`).
    """

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: dict[str, Any]


@dataclass(slots=True)
class Worker:
    """A runner, and its latest signs of life.

    Attributes:
        heartbeat_stats: the JSON object that it sent with its last heartbeat.
        current_rollout_id: the rollout that it works on, as `current_attempt_id`; None while it has no work.
    """

    worker_id: str
    status: WorkerStatus = "unknown"
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """Progress of `Store.prune`: what it has done so far.

    Attributes:
        selected: number of rollouts that match.
        records: number of records that are deleted, or would be, by kind: `rollouts`, `generations`, `blocks`, ...
        bytes: what these took, about.
        size_before: bytes of the whole store before; None where nothing is deleted.
        size_after: bytes of it now; None until all is done.
        advice: how to return more space to the file system, as a sentence; None where all of it is.
    """

    selected: int
    records: Mapping[str, int] = field(default_factory=dict[str, int])
    bytes: int = 0
    size_before: int | None = None
    size_after: int | None = None
    advice: str | None = None


def record_from(kind: type[Record], found: Mapping[str, Any], store: Store | None = None) -> Record:
    """Build a record from its JSON object; fields that it does not have are ignored.

    Args:
        store: the store that returned it.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or is not what it should be.
    """
    values = {each.name: found[each.name] for each in fields(kind) if each.name in found}
    if kind is Rollout:
        values["config"] = RolloutConfig(**found["config"])
        if (attempt := found.get("attempt")) is not None:
            values["attempt"] = record_from(Attempt, attempt, store)
    if kind in (Rollout, Attempt):
        values["store"] = store
    return kind(**values)


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, (Attempt, RolloutConfig)) else value


def with_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give a span's JSON object a trace id and a span id, as OpenTelemetry writes them, where it has none."""
    trace_id, span_id = fields["trace_id"] or secrets.token_hex(16), fields["span_id"] or secrets.token_hex(8)
    return {**fields, "trace_id": trace_id, "span_id": span_id}


def _store_of(record: Attempt | Rollout) -> Store:
    if record.store is None:
        raise TypeError(f"this {type(record).__name__} was not returned by a store: call the store's method instead")
    return record.store
