"""Filters and changes, as the methods of a store take them: keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, TypedDict, get_args, get_type_hints

from agentlightning.generation import Status, Via
from agentlightning.rollout_records import (
    AttemptStatus,
    Mode,
    RolloutConfig,
    RolloutStatus,
)
from agentlightning.trajectory import MergeOptions

__all__ = [
    "AttemptChanges",
    "DriftFilters",
    "Filters",
    "Listed",
    "PruneFilters",
    "RolloutChanges",
    "RolloutPage",
    "SpanFilters",
    "TrajectoryOptions",
    "TripletFilters",
    "check_prune_filters",
    "nullable",
]


class Filters(TypedDict, total=False):
    """Generations to select: those that match all filters. None matches generations without such an id.

    `since` and `until` are nanoseconds since the epoch: `since <= finished_at < until`.
    """

    rollout_id: str | None
    attempt_id: str | None
    session_id: str | None
    call_id: str | None
    response_id: str | None
    model: str | None
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    via: Via | None
    since: int
    until: int
    status: Status


def nullable(filters: type) -> tuple[str, ...]:
    """Return the names of filters for which None selects records without such a value."""
    return tuple(name for name, of in get_type_hints(filters).items() if NoneType in get_args(of))


class RolloutPage(TypedDict, total=False):
    """Page of all rollouts to read. They follow one another in the order in which the first call of each arrived.

    Attributes:
        since: only those of which a call finished at this time or later; nanoseconds since the epoch.
        after: only those that follow this rollout.
        limit: most rollouts to read.
    """

    since: int
    after: str
    limit: int


class TripletFilters(RolloutPage, total=False):
    """Triplets to select: those that match all filters.

    Attributes:
        since: those of calls that finished at this time or later; nanoseconds since the epoch.
        status: those of generations with this status.
        min_reward: those whose reward is at least this.
        weight_version: those of which every sampled id is known to be of this version of the weights.
        agent_id, parent_agent_id, purpose, retry: those of generations that say this of their callers; None for those
            that say nothing.
    """

    status: Status
    min_reward: float
    weight_version: str
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None


class TrajectoryOptions(RolloutPage, MergeOptions, total=False):
    """Filters of rollouts, the way in which their calls become rows, and filters of rows."""


class DriftFilters(RolloutPage, total=False):
    """Calls to compare: those of rollouts that match the filters.

    Attributes:
        model: only calls of this model.
    """

    model: str


class Listed(TypedDict, total=False):
    """Order and page of a list.

    Attributes:
        sort_by: a field; if absent, records are in the order in which they were created, spans by `sequence_id`.
        limit: most records to return; -1, the default, for all.
        offset: records to skip.
    """

    sort_by: str
    sort_order: Literal["asc", "desc"]
    limit: int
    offset: int


class SpanFilters(TypedDict, total=False):
    """Spans to select, besides those of a rollout and attempt; `filter_logic` says how the others combine."""

    trace_id: str
    trace_id_contains: str
    span_id: str
    span_id_contains: str
    parent_id: str
    parent_id_contains: str
    name: str
    name_contains: str
    filter_logic: Literal["and", "or"]
    sort_by: str
    sort_order: Literal["asc", "desc"]
    limit: int
    offset: int


class RolloutChanges(TypedDict, total=False):
    """Fields of a rollout to change; an absent field stays unchanged."""

    input: Any
    mode: Mode | None
    resources_id: str | None
    status: RolloutStatus
    config: RolloutConfig
    metadata: Mapping[str, Any] | None


class PruneFilters(TypedDict, total=False):
    """Rollouts to delete: those that have ended and match all filters. None is no filter.

    Attributes:
        rollout_ids: only these.
        status_in: only those that ended with one of these.
        older_than: seconds: only those that ended longer ago. If it is the only filter, also rollouts that were
            recorded but never created, and calls and spans that name no rollout, if they are older.
    """

    rollout_ids: Sequence[str] | None
    status_in: Sequence[RolloutStatus] | None
    older_than: float | None


def check_prune_filters(filters: PruneFilters) -> None:
    """Refuse unknown names: a misspelt filter would leave the others to select more than was meant.

    Raises:
        TypeError: a name is no filter.
    """
    if unknown := [*filters.keys() - PruneFilters.__annotations__.keys()]:
        known = ", ".join(PruneFilters.__annotations__)
        raise TypeError(f"prune has no filter {unknown[0]!r}: it has {known}; nothing was deleted")


class AttemptChanges(TypedDict, total=False):
    """Fields of an attempt to change; an absent field stays unchanged."""

    status: AttemptStatus
    worker_id: str
    last_heartbeat_time: float
    metadata: Mapping[str, Any]
