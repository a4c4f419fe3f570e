"""The store behind an `agl store`, over HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import msgspec

from agentlightning.completeness import Completeness
from agentlightning.drift import AttemptDrift
from agentlightning.errors import InvalidRecord, NotFound, RolloutUnderWay, StoreError, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss, Status
from agentlightning.rollout_records import (
    FINISHED,
    Attempt,
    Mode,
    NewRollout,
    Pruned,
    Record,
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
from agentlightning.store import wire
from agentlightning.store.documents import to_json
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
    check_prune_filters,
    nullable,
)
from agentlightning.store.http_client import SECONDS_TO_ANSWER, HttpClient, StrangeAnswer
from agentlightning.store.http_generations import GenerationSender
from agentlightning.store.interface import GENERATIONS_AT_ONCE, Store
from agentlightning.store.rows import uuid_bytes
from agentlightning.trajectory import Trajectory, check_options
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HttpStore"]

logger = logging.getLogger("agentlightning.store")

Row = TypeVar("Row", AttemptDrift, Trajectory, Triplet)

NULLABLE = nullable(TripletFilters)
"""Filters of triplets and trajectories for which None selects those without such a value."""
ROLLOUTS_AT_ONCE = 1_000
SECONDS_OF_WAITING = 20.0
PRUNE_ERRORS = {each.__name__: each for each in (RolloutUnderWay, StoreRefused)}
"""Errors that the last line of an answer to `prune` names; all others may pass."""


class _Registered(msgspec.Struct):
    vocabulary: Literal["known", "wanted"] | None


class HttpStore(Store):
    """A store that an `agl store` serves. Connections are kept alive: as many as threads have asked at once.

    Args:
        url: `http(s)://HOST:PORT`, with a path where a proxy has the store there; a user or password is the key, which
            is `AGL_STORE_KEY` if there is none.
        seconds: the most that a request waits for an answer.

    Raises:
        StoreUnavailable: the store cannot be reached, or used, now.
        StoreRefused: the URL does not lead to an `agl store`, or to one that asks for another key.
    """

    def __init__(self, url: str, seconds: float = SECONDS_TO_ANSWER) -> None:
        self._http = HttpClient(url, seconds)
        self._sender: Sender | None = None
        self._generations = GenerationSender(self._http, self._register_again)
        try:
            is_ours = self._json("GET", "/health") == {"status": "ok"}
        except StrangeAnswer:
            is_ours = False
        if not is_ours:
            advice = "give the URL that `agl store` printed when it started"
            raise StoreRefused(f"{self._http.shown} is not an agl store", advice)

    def enqueue_rollouts(self, new: Sequence[NewRollout]) -> list[Rollout]:
        body = {"rollouts": [_new_fields(each) for each in new]}
        return self._records(Rollout, self._json("POST", "/queues/rollouts/enqueue", body=body))

    def dequeue_rollouts(self, limit: int, worker_id: str | None = None) -> list[Rollout]:
        body = {"limit": limit, "worker_id": worker_id}
        return self._records(Rollout, self._json("POST", "/queues/rollouts/dequeue", body=body))

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
        body = {**_new_fields(new), "worker_id": worker_id}
        return self._record(Rollout, self._json("POST", "/rollouts", body=body))

    def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> Rollout:
        route = f"/rollouts/{_part(rollout_id)}/attempts"
        return self._record(Rollout, self._json("POST", route, body={"worker_id": worker_id}))

    def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Rollout]:
        filters = {
            "status_in": status_in,
            "rollout_id_in": rollout_id_in,
            "rollout_id_contains": rollout_id_contains,
            "filter_logic": filter_logic,
        }
        return self._records(Rollout, self._items("/rollouts/search", {**filters, **listed}))

    def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        # By a search: an id that comes from elsewhere may be too long for the server's routes, or have a slash in it.
        with suppress(InvalidRecord):
            for each in self.query_rollouts(rollout_id_in=[rollout_id]):
                return each
        return None

    def update_rollout(self, rollout_id: str, **changes: Unpack[RolloutChanges]) -> Rollout:
        body: dict[str, Any] = dict(changes)
        if "config" in changes:
            body["config"] = changes["config"].as_dict()
        self._json("POST", f"/rollouts/{_part(rollout_id)}", body=body)
        found = self.get_rollout_by_id(rollout_id)
        if found is None:
            raise NotFound(f"there is no rollout {rollout_id!r}")
        return found

    def wait_for_rollouts(
        self, rollout_ids: Sequence[str], timeout: float | None = None, *, recorded: bool = False
    ) -> list[Rollout]:
        ends = None if timeout is None else time.monotonic() + timeout
        wanted = list(dict.fromkeys(rollout_ids))
        ended: list[Rollout] = []
        for start in range(0, len(wanted), ROLLOUTS_AT_ONCE):
            some = wanted[start : start + ROLLOUTS_AT_ONCE]
            while True:
                left = None if ends is None else max(ends - time.monotonic(), 0.0)
                # In slices: a server that is stopped, and proxies, end requests that take long.
                slice_ = SECONDS_OF_WAITING if left is None else min(left, SECONDS_OF_WAITING)
                body = {"rollout_ids": some, "timeout": slice_, "recorded": recorded}
                found = self._records(Rollout, self._json("POST", "/waits/rollouts", body=body, repeatable=True))
                if len(found) == len(some) or left == slice_:
                    break
                known = {each.rollout_id for each in self.query_rollouts(rollout_id_in=some)}
                if known <= {each.rollout_id for each in found}:
                    break
            ids = [each.rollout_id for each in found]
            ended += self.query_rollouts(rollout_id_in=ids) if ids else []
        return ended

    def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        wanted = [*dict.fromkeys(rollout_ids)]
        routes = [f"/rollouts/{_part(each, InvalidRecord)}" for each in wanted]
        for start in range(0, len(wanted), ROLLOUTS_AT_ONCE):
            found = self.query_rollouts(rollout_id_in=wanted[start : start + ROLLOUTS_AT_ONCE])
            if states := {each.rollout_id: each.status for each in found if each.status not in FINISHED}:
                raise RolloutUnderWay(states)
        deleted = 0
        for route in routes:
            with suppress(NotFound):
                self._http.ask("DELETE", route)
                deleted += 1
        return deleted

    def prune(self, *, dry_run: bool = False, **filters: Unpack[PruneFilters]) -> Iterator[Pruned]:
        check_prune_filters(filters)
        body = to_json({**filters, "dry_run": dry_run}).encode()
        with self._http.lines("/prune", body=body) as lines:
            for line in lines:
                found = self._http.read(line, dict[str, Any])
                if "detail" in found:
                    if found.get("error") in PRUNE_ERRORS:
                        raise PRUNE_ERRORS[found["error"]](found["detail"])
                    raise StoreUnavailable(f"{self._http.shown} did not finish: {found['detail']}")
                try:
                    yield Pruned(**found)
                except TypeError as error:
                    raise self._http.strange() from error

    def query_attempts(self, rollout_id: str, **listed: Unpack[Listed]) -> list[Attempt]:
        return self._records(Attempt, self._items(f"/rollouts/{_part(rollout_id)}/attempts/search", dict(listed)))

    def update_attempt(self, rollout_id: str, attempt_id: str, **changes: Unpack[AttemptChanges]) -> Attempt:
        route = f"/rollouts/{_part(rollout_id)}/attempts/{_part(attempt_id)}"
        return self._record(Attempt, self._json("POST", route, body=dict(changes)))

    def heartbeat(self, rollout_id: str, attempt_id: str) -> Attempt:
        route = f"/rollouts/{_part(rollout_id)}/attempts/{_part(attempt_id)}/heartbeat"
        return self._record(Attempt, self._json("POST", route))

    def add_span(self, span: Span) -> Span | None:
        found = self._json("POST", "/spans", body=with_ids(span.as_dict()))
        return None if found is None else self._record(Span, found)

    def query_spans(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[SpanFilters]
    ) -> list[Span]:
        wanted = {"rollout_id": rollout_id, "attempt_id": attempt_id, **filters}
        return self._records(Span, self._items("/spans/search", wanted))

    def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        body = {"rollout_id": rollout_id, "attempt_id": attempt_id}
        return self._field(self._json("POST", "/spans/next", body=body), "sequence_id")

    def add_reward(self, rollout_id: str, attempt_id: str, value: float, generation_id: str | None = None) -> Span:
        route = f"/rollouts/{_part(rollout_id)}/attempts/{_part(attempt_id)}/reward"
        body = {"value": value, "generation_id": generation_id}
        return self._record(Span, self._json("POST", route, body=body))

    def add_resources(self, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        return self._record(Resources, self._json("POST", "/resources", body=resources))

    def update_resources(self, resources_id: str, resources: Mapping[str, Mapping[str, Any]]) -> Resources:
        route = f"/resources/{_part(resources_id, InvalidRecord)}"
        return self._record(Resources, self._json("POST", route, body=resources))

    def get_resources_by_id(self, resources_id: str) -> Resources | None:
        # By a search: the routes have names of their own in the place of an id, such as `latest`.
        return next(iter(self.query_resources(resources_id=resources_id)), None) if resources_id else None

    def get_latest_resources(self) -> Resources | None:
        found = self._json("GET", "/resources/latest")
        return None if found is None else self._record(Resources, found)

    def query_resources(
        self, *, resources_id: str | None = None, resources_id_contains: str | None = None, **listed: Unpack[Listed]
    ) -> list[Resources]:
        wanted = {"resources_id": resources_id, "resources_id_contains": resources_id_contains, **listed}
        query = [(name, str(value)) for name, value in wanted.items() if value is not None]
        return self._records(Resources, self._field(self._json("GET", "/resources", query), "items"))

    def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        **listed: Unpack[Listed],
    ) -> list[Worker]:
        filters = {"status_in": status_in, "worker_id_contains": worker_id_contains, "filter_logic": filter_logic}
        return self._records(Worker, self._items("/workers/search", {**filters, **listed}))

    def get_worker_by_id(self, worker_id: str) -> Worker | None:
        found = self.query_workers(worker_id_contains=worker_id) if worker_id else []
        return next((each for each in found if each.worker_id == worker_id), None)

    def update_worker(self, worker_id: str, heartbeat_stats: Mapping[str, Any] | None = None) -> Worker:
        body = {} if heartbeat_stats is None else {"heartbeat_stats": heartbeat_stats}
        return self._record(Worker, self._json("POST", f"/workers/{_part(worker_id, InvalidRecord)}", body=body))

    def statistics(self) -> dict[str, int]:
        found = self._json("GET", "/statistics")
        return {name: self._field(found, name) for name in found if name.startswith("total_")}

    def register_sender(self, sender: Sender) -> None:
        # An id that is not a UUID would be another route.
        uuid_bytes(sender.id)
        self._sender = sender
        told = {name: getattr(sender, name) for name in ("host", "pid", "started_at", "version", "vllm", "model")}
        vocabulary = sender.vocabulary
        told["vocabulary"] = None if vocabulary is None else vocabulary.digest.hex()
        body = msgspec.json.encode(wire.without_surrogates(told))
        answer = self._http.ask("PUT", f"/senders/{sender.id}", body=body, kind="application/json")
        if vocabulary is not None and self._http.read(answer, _Registered).vocabulary == "wanted":
            route = f"/vocabularies/{vocabulary.digest.hex()}"
            self._http.ask("PUT", route, body=vocabulary.to_bytes(), kind="application/octet-stream")

    def report_progress(self, sender_id: str, progress: Progress) -> int:
        # An id that is not a UUID would be another route.
        uuid_bytes(sender_id)
        route, body = f"/senders/{sender_id}/progress", wire.without_surrogates(asdict(progress))
        try:
            answer = self._json("PUT", route, body=body)
        except NotFound:
            if not self._register_again(sender_id):
                raise
            answer = self._json("PUT", route, body=body)
        return self._field(answer, "time")

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        new, refused = self._generations.send(generations, sender_id)
        if refused:
            raise InvalidRecord({each.id: each.reason for each in refused}, new)
        return new

    def generations(
        self, at_once: int = GENERATIONS_AT_ONCE, /, *, details: bool = True, **filters: Unpack[Filters]
    ) -> Iterator[Generation]:
        wanted = [*_query(filters), ("limit", str(at_once)), *([] if details else [("details", "false")])]
        cursor: list[tuple[str, str]] = []
        while True:
            found = self._envelope(self._http.ask("GET", "/generations", [*wanted, *cursor]))
            yield from found.generations
            if found.next is None:
                return
            cursor = [("cursor", found.next)]

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        answer = self._http.ask("GET", "/generations/tally", list(_query(filters)))
        return self._http.read(answer, dict[Status, int])

    def triplets(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[TripletFilters]
    ) -> Iterator[Triplet]:
        return self._rows("/triplets", rollout_id, attempt_id, filters, Triplet.from_dict)

    def trajectories(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **options: Unpack[TrajectoryOptions]
    ) -> Iterator[Trajectory]:
        check_options(options)
        return self._rows("/trajectories", rollout_id, attempt_id, options, Trajectory.from_dict)

    def drift(
        self, rollout_id: str | None = None, attempt_id: str | None = None, **filters: Unpack[DriftFilters]
    ) -> Iterator[AttemptDrift]:
        return self._rows("/drift", rollout_id, attempt_id, filters, AttemptDrift.from_dict)

    def _rows(
        self,
        route: str,
        rollout_id: str | None,
        attempt_id: str | None,
        filters: Mapping[str, Any],
        row_from: Callable[[dict[str, Any]], Row],
    ) -> Iterator[Row]:
        # In the query, not in the path: an id may have a slash in it.
        wanted = {"rollout_id": rollout_id, "attempt_id": attempt_id, **filters}
        query = [(name, _text(value)) for name, value in wanted.items() if value is not None]
        query += [("without", name) for name in NULLABLE if wanted.get(name, "") is None]
        with ExitStack() as stack:
            try:
                lines = stack.enter_context(self._http.lines(route, query))
            except InvalidRecord:
                if filters:
                    raise
                # A text that is no id to the queue is the id of none of its rollouts.
                return
            for line in lines:
                fields = self._http.read(line, dict[str, Any])
                if fields.keys() == {"detail"}:
                    logger.warning("%s", fields["detail"])
                    continue
                try:
                    found = row_from(fields)
                except (KeyError, TypeError, ValueError) as error:
                    raise self._http.strange() from error
                yield found

    def completeness(self, rollout_id: str, attempt_id: str | None = None) -> Completeness:
        ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
        # In the query, not in the path: an id may have a slash in it.
        wanted = [(name, value) for name, value in ids.items() if value is not None]
        try:
            return Completeness.from_dict(self._json("GET", "/completeness", wanted))
        except InvalidRecord:
            # A text that is no id to the queue is the id of none of its rollouts.
            return Completeness(None, False)
        except (KeyError, TypeError) as error:
            raise self._http.strange() from error

    def add_losses(self, losses: Sequence[Loss]) -> None:
        self._generations.send_losses(losses)

    def losses(self) -> Iterator[Loss]:
        yield from self._http.read(self._http.ask("GET", "/losses"), dict[str, list[Loss]])["items"]

    def close(self) -> None:
        self._http.close()

    def _register_again(self, sender_id: str) -> bool:
        """Register a sender with a server that has another database since; tell whether it is this store's."""
        if self._sender is None or self._sender.id != sender_id:
            return False
        self.register_sender(self._sender)
        return True

    def _json(
        self, method: str, route: str, query: Sequence[tuple[str, str]] = (), body: Any = None, repeatable: bool = False
    ) -> Any:
        content = None if body is None else to_json(body).encode()
        answer = self._http.ask(method, route, query, content, kind="application/json", repeatable=repeatable)
        return self._http.read(answer, Any)

    def _items(self, route: str, wanted: Mapping[str, Any]) -> list[Any]:
        body = {name: value for name, value in wanted.items() if value is not None}
        return self._field(self._json("POST", route, body=body, repeatable=True), "items")

    def _field(self, answer: Any, name: str) -> Any:
        try:
            return answer[name]
        except (KeyError, TypeError) as error:
            raise self._http.strange() from error

    def _record(self, kind: type[Record], found: Any) -> Record:
        try:
            return record_from(kind, found, self)
        except (KeyError, TypeError, ValueError) as error:
            raise self._http.strange() from error

    def _records(self, kind: type[Record], found: Any) -> list[Record]:
        if not isinstance(found, list):
            raise self._http.strange()
        return [self._record(kind, each) for each in found]

    def _envelope(self, answer: bytes) -> wire.Envelope:
        try:
            return wire.decode(answer)
        except ValueError as error:
            raise self._http.strange() from error


def _new_fields(new: NewRollout) -> dict[str, Any]:
    return {
        "input": new.input,
        "mode": new.mode,
        "resources_id": new.resources_id,
        "config": new.config.as_dict(),
        "metadata": dict(new.metadata),
    }


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _part(text: str, error: type[StoreError] = NotFound) -> str:
    """Quote an id as a part of a path.

    Args:
        error: raised for an id that no path can have: an empty one, one with a slash, or the name of another route.
    """
    if not text or "/" in text or text == "search":
        raise error(f"{text[:100]!r} cannot be an id in a request over HTTP")
    return quote(text, safe="", errors="replace")


def _query(filters: Filters) -> Iterator[tuple[str, str]]:
    for name, value in filters.items():
        if name not in Filters.__annotations__:
            raise KeyError(name)
        yield ("without", name) if value is None else (name, str(value))
