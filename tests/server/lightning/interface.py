"""Use the whole LightningStore interface through Agent Lightning's own client, and print what was found as JSON.

It is used against `agl store`, and against Agent Lightning's in-memory store behind its own server. Runs in the
environment of Agent Lightning 0.3: `interface.py URL`, the URL of an empty `agl store`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

# By name, since type checkers would take it for this package.
lightning: Any = importlib.import_module("agentlightning")
sdk: Any = importlib.import_module("opentelemetry.sdk.trace")
telemetry: Any = importlib.import_module("opentelemetry.trace")
Resource: Any = importlib.import_module("opentelemetry.sdk.resources").Resource
ClientResponseError: Any = importlib.import_module("aiohttp").ClientResponseError
Config: Any = lightning.RolloutConfig
Enqueue: Any = importlib.import_module("agentlightning.types").EnqueueRolloutRequest
Span: Any = lightning.Span

# OpenTelemetry's spans have a lock, and the client sends its address.
ADDRESS = re.compile("0x[0-9a-f]+")
IDS = re.compile(r"\b(ro|at|rs)-[0-9a-f-]{8,}")
TRACE, OTHER_TRACE = "ab" * 16, "cd" * 16
SECONDS = 60


class Facts:
    """Facts by name, in a comparable form: random ids are numbered as they appear, and times of today are `now`."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._ids: dict[str, str] = {}

    def __call__(self, name: str, value: Any) -> None:
        assert name not in self.found, name
        self.found[name] = self._plain(value)

    def _plain(self, value: Any) -> Any:
        if hasattr(value, "model_dump"):
            value = value.model_dump(mode="json")
        if isinstance(value, dict):
            return {self._plain(name): self._plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(each) for each in value]
        if isinstance(value, float) and abs(time.time() - value) < 3600:
            return "now"
        if isinstance(value, str):
            value = ADDRESS.sub("0x", value)
            return IDS.sub(lambda found: self._ids.setdefault(found[0], f"{found[1]}-{len(self._ids)}"), value)
        return value


Section = Callable[[Any, Facts], Awaitable[None]]


async def resources(store: Any, note: Facts) -> None:
    note("latest of none", await store.get_latest_resources())
    note("unknown", await store.get_resources_by_id("rs-unknown"))
    note("a rollout where there are none", await store.start_rollout("without resources"))
    first = {
        "llm": lightning.LLM(endpoint="http://localhost/v1", model="m", sampling_parameters={"temperature": 0.5}),
        "proxy": lightning.ProxyLLM(endpoint="http://localhost:1/v1", model="p", api_key="k"),
        "prompt": lightning.PromptTemplate(template="{x} ist größer", engine="f-string"),
    }
    second = {"prompt": lightning.PromptTemplate(template="{{ x }}", engine="jinja")}
    added = await store.add_resources(first)
    note("added", added)
    read = (await store.get_resources_by_id(added.resources_id)).resources
    note("read again are equal", read == first)
    note("read again are of the same types", {name: type(each).__name__ for name, each in read.items()})
    note("latest", await store.get_latest_resources())
    note("added without any", await store.add_resources({}))
    note("under an id of one's own", await store.update_resources("mine", second))
    note("latest are those of one's own", await store.get_latest_resources())
    changed = await store.update_resources(added.resources_id, second)
    note("changed", changed)
    note("changed were created before", changed.create_time == added.create_time < changed.update_time)
    note("latest are those that changed", await store.get_latest_resources())
    note("a rollout has the latest", (await store.start_rollout("latest")).resources_id)
    note("a rollout has those it names", (await store.start_rollout("named", resources_id="mine")).resources_id)
    for name, asked in {
        "all": {},
        "by id": {"resources_id": "mine"},
        "by part of an id": {"resources_id_contains": "in"},
        "by version": {"sort_by": "version", "sort_order": "desc"},
        "by moment": {"sort_by": "update_time", "limit": 2},
        "page": {"limit": 1, "offset": 1},
        "behind the end": {"offset": 7},
    }.items():
        note(f"found {name}", await store.query_resources(**asked))


async def queue(store: Any, note: Facts) -> None:
    note("empty", await store.dequeue_rollout(worker_id="a"))
    idle = await store.get_worker_by_id("a")
    note("worker that finds it empty", idle)
    await store.dequeue_rollout(worker_id="a")
    still = await store.get_worker_by_id("a")
    note("worker that finds it empty again has been idle", idle.last_idle_time == still.last_idle_time)
    note("worker that finds it empty again has asked again", idle.last_dequeue_time < still.last_dequeue_time)
    note(
        "one",
        await store.enqueue_rollout(
            {"nested": [1, 2.5, None, "ü"]},
            mode="train",
            resources_id="mine",
            config=Config(
                timeout_seconds=900.0, unresponsive_seconds=800.5, max_attempts=3, retry_condition=["timeout"]
            ),
            metadata={"of": "one"},
        ),
    )
    note("many", await store.enqueue_many_rollouts([Enqueue(input=f"many {n}", mode="val") for n in range(3)]))
    note("none", await store.enqueue_many_rollouts([]))
    await store.start_rollout("never in the queue")
    note("first", await store.dequeue_rollout(worker_id="a"))
    note("worker that has the first", await store.get_worker_by_id("a"))
    note("two", await store.dequeue_many_rollouts(limit=2, worker_id="b"))
    note("worker that has two", await store.get_worker_by_id("b"))
    note("of no limit", await store.dequeue_many_rollouts(limit=0))
    note("rest", await store.dequeue_many_rollouts(limit=5))
    note("end", await store.dequeue_many_rollouts(limit=5, worker_id="b"))
    note("worker that was busy and finds it empty", await store.get_worker_by_id("b"))
    note("without a worker", await store.dequeue_rollout())


async def changes(store: Any, note: Facts) -> None:
    rollout_id = (await store.enqueue_rollout("before")).rollout_id
    for change in (
        {},
        {"input": {"after": True}},
        {"input": None},
        {"mode": "test"},
        {"mode": None},
        {"resources_id": "mine"},
        {"resources_id": None},
        {"config": Config(max_attempts=2, retry_condition=["failed", "unresponsive"])},
        {"metadata": {"a": {"b": 1}}},
        {"metadata": None},
        {"status": "preparing"},
        {"status": "running"},
        {"status": "succeeded"},
        {"status": "failed"},
        {"status": "cancelled"},
        {"input": "together", "mode": "val", "metadata": {}, "status": "requeuing"},
    ):
        shown = ", ".join(f"{name}={each}" for name, each in change.items())
        note(f"{shown or 'nothing'}", await store.update_rollout(rollout_id, **change))
        if "status" in change:
            note(f"{shown}, read again", await store.get_rollout_by_id(rollout_id))
    note("queued again", await store.dequeue_rollout())

    a, b, c = [each.rollout_id for each in await store.enqueue_many_rollouts([Enqueue(input=name) for name in "abc"])]
    await store.update_rollout(b, status="cancelled")
    note("cancelled ones are not in the queue", await _dequeued(store))
    await store.update_rollout(c, status="requeuing")
    await store.update_rollout(a, status="queuing")
    await store.update_rollout(b, status="queuing")
    await store.update_rollout(c, status="queuing")
    note("they are queued as they come, once", await _dequeued(store))
    d, _ = [each.rollout_id for each in await store.enqueue_many_rollouts([Enqueue(input=name) for name in "de"])]
    await store.update_rollout(d, status="cancelled")
    await store.update_rollout(d, status="queuing")
    note("one that was cancelled in the queue and is queued again", await _dequeued(store))
    f = (await store.enqueue_rollout("f")).rollout_id
    await store.start_attempt(f)
    note("one that is started is not in the queue", await _dequeued(store))


async def _dequeued(store: Any) -> list[Any]:
    return [(each.input, each.attempt.sequence_id) for each in await store.dequeue_many_rollouts(limit=10)]


async def attempts(store: Any, note: Facts) -> None:
    queued = (await store.enqueue_rollout("waits")).rollout_id
    note("latest of none", await store.get_latest_attempt(queued))
    note("latest of an unknown rollout", await store.get_latest_attempt("ro-unknown"))
    note("all of none", await store.query_attempts(queued))
    note("all of an unknown rollout", await store.query_attempts("ro-unknown"))
    note("unknown rollout", await store.get_rollout_by_id("ro-unknown"))
    note("rollout without", await store.get_rollout_by_id(queued))
    await store.update_rollout(queued, status="cancelled")

    started = await store.start_rollout("x", "train", None, Config(), {"m": 1}, worker_id="w1")
    note("started", started)
    note("worker that started", await store.get_worker_by_id("w1"))
    rollout_id, first = started.rollout_id, started.attempt.attempt_id
    note("another", await store.start_attempt(rollout_id, worker_id="w2"))
    note("a third", (await store.start_attempt(rollout_id)).attempt)
    note("rollout with its latest", await store.get_rollout_by_id(rollout_id))
    for name, asked in {
        "all": {},
        "backwards": {"sort_order": "desc"},
        "page": {"limit": 1, "offset": 1},
        "by moment": {"sort_by": "start_time", "sort_order": "desc"},
        "by end": {"sort_by": "end_time"},
        "by worker": {"sort_by": "worker_id"},
        "by worker, backwards": {"sort_by": "worker_id", "sort_order": "desc"},
        "by status": {"sort_by": "status", "sort_order": "desc"},
        "in no order": {"sort_by": None},
    }.items():
        found = await store.query_attempts(rollout_id, **asked)
        note(f"found {name}", ([each.sequence_id for each in found.items], found.total))

    note("the first fails", await store.update_attempt(rollout_id, first, status="failed"))
    note("an earlier one's end is not the rollout's", (await store.get_rollout_by_id(rollout_id)).status)
    note("worker that failed", await store.get_worker_by_id("w1"))
    note("the latest runs", await store.update_attempt(rollout_id, "latest", status="running", worker_id="w3"))
    note("the latest's rollout", await store.get_rollout_by_id(rollout_id))
    note("worker that runs", await store.get_worker_by_id("w3"))
    note("heard of", await store.update_attempt(rollout_id, "latest", last_heartbeat_time=123.5))
    note("metadata", await store.update_attempt(rollout_id, "latest", metadata={"tokens": [1, 2]}))
    note("nothing changes", await store.update_attempt(rollout_id, "latest"))
    note("succeeds", await store.update_attempt(rollout_id, "latest", status="succeeded"))
    note("rollout succeeds", await store.get_rollout_by_id(rollout_id))
    note("worker that succeeded", await store.get_worker_by_id("w3"))
    note("one that ended may be tried again", await store.start_attempt(rollout_id))

    for status in ("failed", "timeout", "unresponsive"):
        once = await store.start_rollout(f"once {status}", worker_id=f"w-{status}")
        note(f"{status}", await store.update_attempt(once.rollout_id, once.attempt.attempt_id, status=status))
        note(f"{status} rollout", await store.get_rollout_by_id(once.rollout_id))
        note(f"{status} worker", await store.get_worker_by_id(f"w-{status}"))
        config = Config(max_attempts=2, retry_condition=[status])
        twice = await store.start_rollout(f"twice {status}", config=config)
        await store.update_attempt(twice.rollout_id, "latest", status=status)
        note(f"{status}, to be tried again", await store.get_rollout_by_id(twice.rollout_id))
        note(f"{status}, tried again", await store.dequeue_rollout(worker_id=f"w-{status}"))
        await store.update_attempt(twice.rollout_id, "latest", status=status)
        note(f"{status}, tried often enough", await store.get_rollout_by_id(twice.rollout_id))

    ends = await store.start_rollout("cancelled while it runs")
    await store.update_rollout(ends.rollout_id, status="cancelled")
    note("of a cancelled rollout", await store.update_attempt(ends.rollout_id, "latest", status="succeeded"))
    note("the cancelled rollout", await store.get_rollout_by_id(ends.rollout_id))


async def rollouts(store: Any, note: Facts) -> None:
    made = await store.enqueue_many_rollouts(
        [
            Enqueue(input=f"q{n}", mode=mode, resources_id=resources_id)
            for n, (mode, resources_id) in enumerate(
                [("val", "z"), (None, "y"), ("train", "z"), ("test", "x"), ("train", "y"), (None, "z")]
            )
        ]
    )
    ids = [each.rollout_id for each in made]
    await store.dequeue_many_rollouts(limit=3)
    await store.update_attempt(ids[1], "latest", status="succeeded")
    await store.update_attempt(ids[0], "latest", status="failed")
    await store.update_rollout(ids[4], status="cancelled")
    # The end of an id, which is unique; ids begin with the time.
    part = ids[2][-12:]
    for name, asked in {
        "of statuses": {"status_in": ["succeeded", "cancelled"]},
        "of no status": {"status_in": []},
        "of ids": {"rollout_id_in": [ids[5], ids[2], "ro-unknown"]},
        "of no id": {"rollout_id_in": []},
        "of ids by their old name": {"rollout_ids": [ids[3]]},
        "of statuses by their old name": {"status": ["queuing"]},
        "of part of an id": {"rollout_id_contains": part},
        "of part of an id in capitals": {"rollout_id_contains": "RO-"},
        "of all of these": {"rollout_id_in": ids, "rollout_id_contains": part, "status_in": ["preparing"]},
        "of all of these, which none is": {"rollout_id_contains": part, "status_in": ["failed"]},
        "of one of these": {
            "rollout_id_in": [ids[0]],
            "rollout_id_contains": part,
            "status_in": ["cancelled"],
            "filter_logic": "or",
        },
        "of one of nothing": {"filter_logic": "or"},
        "everywhere": {},
    }.items():
        found = await store.query_rollouts(**asked)
        note(f"found {name}", ([(each.input, hasattr(each, "attempt")) for each in found.items], found.total))
    for sort_by in ("input", "start_time", "end_time", "mode", "resources_id", "status"):
        for sort_order in ("asc", "desc"):
            found = await store.query_rollouts(rollout_id_in=ids, sort_by=sort_by, sort_order=sort_order)
            note(f"by {sort_by}, {sort_order}", [each.input for each in found.items])
    found = [each.rollout_id for each in (await store.query_rollouts(sort_by="rollout_id")).items]
    note("by id", found == sorted(found))
    for limit, offset in ((2, 0), (2, 2), (10, 4), (1, 6), (-1, 5)):
        found = await store.query_rollouts(rollout_id_in=ids, sort_by="mode", limit=limit, offset=offset)
        note(f"page {limit}, {offset}", ([each.input for each in found.items], found.limit, found.offset, found.total))
    await store.dequeue_many_rollouts(limit=10)


async def workers(store: Any, note: Facts) -> None:
    note("unknown", await store.get_worker_by_id("unknown"))
    note("new", await store.update_worker("v1"))
    note("new with stats", await store.update_worker("v2", {"cpu": {"percent": 1.5}}))
    note("stats stay", await store.update_worker("v2"))
    note("stats are replaced", await store.update_worker("v2", {"gpu": None}))
    note("read again", await store.get_worker_by_id("v2"))
    busy = await store.start_rollout("work", worker_id="v3")
    note("heard of while busy", await store.update_worker("v3", {}))
    await store.update_attempt(busy.rollout_id, "latest", worker_id="V4")
    note("worker that takes over", await store.get_worker_by_id("V4"))
    for name, asked in {
        "all": {},
        "of statuses": {"status_in": ["busy", "unknown"]},
        "of no status": {"status_in": []},
        "of part of an id": {"worker_id_contains": "v"},
        "of both": {"worker_id_contains": "v", "status_in": ["busy"]},
        "of one of both": {"worker_id_contains": "V", "status_in": ["unknown"], "filter_logic": "or"},
        "by id, backwards": {"sort_by": "worker_id", "sort_order": "desc"},
        "by status": {"sort_by": "status"},
        "by status, backwards": {"sort_by": "status", "sort_order": "desc"},
        "by heartbeat": {"sort_by": "last_heartbeat_time"},
        "by heartbeat, backwards": {"sort_by": "last_heartbeat_time", "sort_order": "desc"},
        "by idleness": {"sort_by": "last_idle_time", "limit": 3},
        "by dequeuing": {"sort_by": "last_dequeue_time", "sort_order": "desc", "offset": 2},
        "page": {"limit": 2, "offset": 3},
    }.items():
        found = await store.query_workers(**asked)
        note(f"found {name}", ([each.worker_id for each in found.items], found.limit, found.offset, found.total))


def _span(attempted: Any, sequence_id: int, name: str = "s", **fields: Any) -> Any:
    return Span.from_attributes(
        **{
            "attributes": {"tokens": [1, 2, 3], "logprobs": [-0.25, -1e-7], "flag": True, "text": "ü\n\u2028"},
            "rollout_id": attempted.rollout_id,
            "attempt_id": attempted.attempt.attempt_id,
            "sequence_id": sequence_id,
            "name": name,
            "trace_id": TRACE,
            "span_id": f"{sequence_id:016x}",
            "start_time": 1000.5 + sequence_id,
            "end_time": None if sequence_id == 3 else 2000.25 - sequence_id,
            **fields,
        }
    )


async def spans(store: Any, note: Facts) -> None:
    attempted = await store.start_rollout("traced", worker_id="s1")
    rollout_id, attempt_id = attempted.rollout_id, attempted.attempt.attempt_id
    note("none", await store.query_spans(rollout_id))
    note("none of the latest", await store.query_spans(rollout_id, "latest"))
    note("none of an unknown rollout", await store.query_spans("ro-unknown", "latest"))
    note("first number", await store.get_next_span_sequence_id(rollout_id, attempt_id))
    span = _span(attempted, 2)
    span.and_more = {"extra": [None]}
    note("added", await store.add_span(span))
    note("added is what was sent", (await store.query_spans(rollout_id)).items == [span])
    note("attempt runs", await store.get_latest_attempt(rollout_id))
    note("rollout runs", (await store.get_rollout_by_id(rollout_id)).status)
    note("added again", await store.add_span(_span(attempted, 2, "of the same id")))
    numbers = [await store.get_next_span_sequence_id(rollout_id, attempt_id)]
    await store.add_span(_span(attempted, 9, "high", trace_id=OTHER_TRACE, parent_id=f"{2:016x}"))
    numbers += [await store.get_next_span_sequence_id(rollout_id, attempt_id)]
    await store.add_span(_span(attempted, 4, "low"))
    numbers += await store.get_many_span_sequence_ids([(rollout_id, attempt_id)] * 3)
    note("numbers", numbers)
    many = [_span(attempted, n, f"many {n}", parent_id=f"{9:016x}") for n in (3, 4, 5)]
    note("many, one of them again", [each.name for each in await store.add_many_spans(many)])

    parent, child = _otel_spans()
    note("of opentelemetry", await store.add_otel_span(rollout_id, attempt_id, child))
    note("of opentelemetry again", await store.add_otel_span(rollout_id, attempt_id, child))
    note("of opentelemetry, numbered", await store.add_otel_span(rollout_id, attempt_id, parent, sequence_id=40))
    note("number after it", await store.get_next_span_sequence_id(rollout_id, attempt_id))
    found = (await store.query_spans(rollout_id, name="parent")).items
    note("of opentelemetry is what was sent", found == [Span.from_opentelemetry(parent, rollout_id, attempt_id, 40)])

    again = await store.start_attempt(rollout_id)
    note("none of the new attempt", await store.query_spans(rollout_id, "latest"))
    second = _span(again, 30, "second try", span_id=f"{2:016x}")
    note("same id in another attempt", (await store.add_span(second)).name)
    for name, asked in {
        "all": {},
        "of the latest": {"attempt_id": "latest"},
        "of an attempt": {"attempt_id": attempt_id},
        "of an unknown attempt": {"attempt_id": "at-unknown"},
        "of a trace": {"trace_id": OTHER_TRACE},
        "of part of a trace": {"trace_id_contains": "dcd"},
        "of a span": {"span_id": f"{5:016x}"},
        "of part of a span": {"span_id_contains": "00000005"},
        "of a parent": {"parent_id": f"{9:016x}"},
        "of part of a parent": {"parent_id_contains": "0009"},
        "of a name": {"name": "many 3"},
        "of part of a name": {"name_contains": "any"},
        "of part of a name in capitals": {"name_contains": "ANY"},
        "of both": {"name_contains": "any", "span_id_contains": "5"},
        "of one of both": {"name": "low", "parent_id": f"{2:016x}", "filter_logic": "or"},
        "of one of both in the latest": {
            "attempt_id": "latest",
            "name": "low",
            "name_contains": "try",
            "filter_logic": "or",
        },
        "of one of nothing": {"filter_logic": "or"},
        "by number, backwards": {"attempt_id": attempt_id, "sort_order": "desc"},
        "by name": {"attempt_id": attempt_id, "sort_by": "name"},
        "by start": {"attempt_id": attempt_id, "sort_by": "start_time", "sort_order": "desc"},
        "by end": {"attempt_id": attempt_id, "sort_by": "end_time"},
        "by parent": {"attempt_id": attempt_id, "sort_by": "parent_id"},
        "by parent, backwards": {"attempt_id": attempt_id, "sort_by": "parent_id", "sort_order": "desc"},
        "by trace": {"attempt_id": attempt_id, "sort_by": "trace_id"},
        "by id": {"attempt_id": attempt_id, "sort_by": "span_id"},
        "in no order": {"attempt_id": attempt_id, "sort_by": None},
        "page": {"limit": 2, "offset": 1},
        "last page": {"limit": 5, "offset": 6},
    }.items():
        found = await store.query_spans(rollout_id, **asked)
        note(f"found {name}", ([each.name for each in found.items], found.limit, found.offset, found.total))

    heard = (await store.get_latest_attempt(rollout_id)).last_heartbeat_time
    await store.add_span(second)
    note("added again is no sign of life", (await store.get_latest_attempt(rollout_id)).last_heartbeat_time == heard)
    await store.update_attempt(rollout_id, "latest", status="succeeded")
    note("after the end", (await store.add_span(_span(again, 50))).sequence_id)
    note("the end stays", (await store.get_rollout_by_id(rollout_id)).status)


class _Ids:
    """Generator of OpenTelemetry ids that are the same in every run."""

    def __init__(self) -> None:
        self._last = 0x1000

    def generate_span_id(self) -> int:
        self._last += 1
        return self._last

    generate_trace_id = generate_span_id

    def is_trace_id_random(self) -> bool:
        return False


def _otel_spans() -> tuple[Any, Any]:
    """Make a span that failed and has a link, and a child of it."""
    resource = Resource({"service.name": "test", "numbers": (1, 2)}, "https://example.org/schema")
    tracer = sdk.TracerProvider(resource=resource, id_generator=_Ids()).get_tracer("tests", "1.2")
    state = telemetry.TraceState([("vendor", "value")])
    elsewhere = telemetry.SpanContext(5, 6, True, telemetry.TraceFlags(1), state)
    moment = 1_600_000_000_000_000_000
    parent = tracer.start_span("parent", links=[telemetry.Link(elsewhere, {"why": "test"})], start_time=moment)
    inside = telemetry.set_span_in_context(parent)
    child = tracer.start_span("child", inside, telemetry.SpanKind.CLIENT, {"ids": (7, 8)}, start_time=moment + 1)
    child.add_event("token", {"id": 7}, timestamp=moment + 2)
    child.end(moment + 1_500_000_000)
    parent.set_status(telemetry.Status(telemetry.StatusCode.ERROR, "broken"))
    parent.end(moment + 2_000_000_000)
    return parent, child


async def waits(store: Any, note: Facts) -> None:
    a, b, c = [each.rollout_id for each in await store.enqueue_many_rollouts([Enqueue(input=name) for name in "abc"])]
    await store.dequeue_many_rollouts(limit=3)

    async def waited(*rollout_ids: str, timeout: float | None) -> list[str]:
        return [each.input for each in await store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)]

    note("for none", await waited(timeout=None))
    note("for an unknown one", await waited("ro-unknown", timeout=0.0))
    note("too short", await waited(a, b, timeout=0.0))
    await store.update_attempt(b, "latest", status="succeeded")
    note("for one that has ended", await waited(b, timeout=None))
    note("for one of two that has ended", await waited(a, b, timeout=0.1))
    await store.update_rollout(c, status="cancelled")
    waiting = asyncio.create_task(waited(c, a, b, timeout=None))
    done, _ = await asyncio.wait([waiting], timeout=0.5)
    note("is waited for", not done)
    await store.update_attempt(a, "latest", status="failed")
    note("until all have ended", await waiting)


async def _until(store: Any, rollout_id: str, status: str) -> Any:
    """Wait until a rollout has this status, and return it."""
    deadline = time.monotonic() + SECONDS
    while (found := await store.get_rollout_by_id(rollout_id)).status != status:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


async def deadlines(store: Any, note: Facts) -> None:
    for status, limit in (("timeout", "timeout_seconds"), ("unresponsive", "unresponsive_seconds")):
        config = Config(**{limit: 0.3}, max_attempts=2, retry_condition=[status])
        first = await store.start_rollout(f"late {status}", config=config, worker_id=f"l-{status}")
        note(f"{status}, first", await _until(store, first.rollout_id, "requeuing"))
        note(f"{status}, worker", await store.get_worker_by_id(f"l-{status}"))
        note(f"{status}, second", await store.dequeue_rollout(worker_id=f"l-{status}"))
        note(f"{status}, end", await _until(store, first.rollout_id, "failed"))
        found = await store.query_attempts(first.rollout_id)
        note(f"{status}, attempts", [(each.status, each.end_time) for each in found.items])
        other = await store.start_rollout(f"late {status}, not again", config=Config(**{limit: 0.3}, max_attempts=5))
        note(f"{status} is not tried again after", await _until(store, other.rollout_id, "failed"))

    config = Config(timeout_seconds=0.3, unresponsive_seconds=900.0, max_attempts=3, retry_condition=["timeout"])
    alive = await store.start_rollout("alive, and late", config=config)
    await store.add_span(_span(alive, 1))
    found = await _until(store, alive.rollout_id, "requeuing")
    note("a span does not keep from being late", found.attempt.status)
    await store.dequeue_rollout()
    await store.update_attempt(alive.rollout_id, "latest", status="succeeded")
    earlier = await store.start_rollout("heard of long ago", config=Config(unresponsive_seconds=900.0))
    await store.update_attempt(earlier.rollout_id, "latest", last_heartbeat_time=time.time() - 3000)
    note("heard of long ago", await _until(store, earlier.rollout_id, "failed"))
    queued = await store.enqueue_rollout(
        "waits for long", config=Config(timeout_seconds=0.01, unresponsive_seconds=0.01)
    )
    await asyncio.sleep(0.1)
    note("who waits is not late", await store.get_rollout_by_id(queued.rollout_id))
    await store.update_rollout(queued.rollout_id, status="cancelled")


async def revivals(store: Any, note: Facts) -> None:
    for status in ("unresponsive", "timeout", "failed"):
        config = Config(max_attempts=3, retry_condition=[status])
        gone = await store.start_rollout(f"gone, {status}", config=config, worker_id=f"r-{status}")
        await store.update_attempt(gone.rollout_id, "latest", status=status)
        note(f"{status}, queued", (await store.get_rollout_by_id(gone.rollout_id)).status)
        await store.add_span(_span(gone, 1))
        note(f"{status}, attempt after a span", (await store.get_latest_attempt(gone.rollout_id)).status)
        note(f"{status}, rollout after a span", (await store.get_rollout_by_id(gone.rollout_id)).status)
        note(f"{status}, queue after a span", await _dequeued(store))
    config = Config(max_attempts=3, retry_condition=["unresponsive"])
    first = await store.start_rollout("gone, and tried again", config=config)
    await store.update_attempt(first.rollout_id, "latest", status="unresponsive")
    await store.dequeue_rollout()
    await store.add_span(_span(first, 1))
    note("an earlier attempt runs", [each.status for each in (await store.query_attempts(first.rollout_id)).items])
    note("its rollout is the latest's", (await store.get_rollout_by_id(first.rollout_id)).status)
    await store.update_attempt(first.rollout_id, first.attempt.attempt_id, status="succeeded")
    note("an earlier attempt succeeds", [each.status for each in (await store.query_attempts(first.rollout_id)).items])
    note("its rollout is the latest's still", (await store.get_rollout_by_id(first.rollout_id)).status)


async def errors(store: Any, note: Facts) -> None:
    async def refused(name: str, call: Awaitable[Any]) -> None:
        try:
            note(name, await call)
        except ClientResponseError as error:
            note(name, error.status)

    attempted = await store.start_rollout("with an attempt")
    queued = (await store.enqueue_rollout("without an attempt")).rollout_id
    known = attempted.rollout_id
    await refused("a rollout that is not there is changed", store.update_rollout("ro-unknown", mode="val"))
    await refused("a rollout that is not there is tried", store.start_attempt("ro-unknown"))
    await refused("its attempt is changed", store.update_attempt("ro-unknown", "latest", status="failed"))
    await refused("an attempt that is not there is changed", store.update_attempt(known, "at-1", status="failed"))
    await refused("no attempt is changed", store.update_attempt(queued, "latest", status="failed"))
    await refused("a span of no rollout", store.add_span(_span(attempted, 1, rollout_id="ro-unknown")))
    await refused("a span of no attempt", store.add_span(_span(attempted, 1, attempt_id="at-unknown")))
    await refused("an unknown status", store.update_rollout(known, status="happy"))
    await refused("a status that is null", store.update_rollout(known, status=None))
    await refused("an attempt's status that is null", store.update_attempt(known, "latest", status=None))
    await refused("stats that are null", store.update_worker("e1", None))
    await refused("an unknown mode", store.update_rollout(known, mode="play"))
    await refused("sorted by what is not there", store.query_rollouts(sort_by="color"))
    await refused("a page of nothing", store.query_rollouts(limit=0))
    await refused("a page of less", store.query_spans(known, limit=-2))
    await refused("a page before the first", store.query_attempts(known, offset=-1))
    await refused("another logic", store.query_workers(filter_logic="xor"))
    note("nothing has changed", (await store.get_rollout_by_id(known)).status)


async def leniences(store: Any, note: Facts) -> None:
    """Send values that are slightly invalid but accepted."""
    started = await store.start_rollout("empty ids", resources_id="", worker_id="")
    rollout_id = started.rollout_id
    note("started with empty ids", started)
    note("a worker", (await store.update_attempt(rollout_id, "latest", worker_id="n1")).worker_id)
    note("no worker any more", (await store.update_attempt(rollout_id, "latest", worker_id="")).worker_id)
    note("none since", (await store.get_latest_attempt(rollout_id)).worker_id)
    note("no resources any more", (await store.update_rollout(rollout_id, resources_id="")).resources_id)
    note("another without a worker", (await store.start_attempt(rollout_id, worker_id="")).attempt.worker_id)
    queued = await store.enqueue_rollout("empty ids", resources_id="")
    note("queued without resources", queued.resources_id)
    note("taken without a worker", (await store.dequeue_rollout(worker_id="")).attempt.worker_id)

    attempted = await store.start_rollout("spans")
    rollout_id, attempt_id = attempted.rollout_id, attempted.attempt.attempt_id
    for number in (-7, 0):
        sent = _span(attempted, number, parent_id="", span_id=f"{number + 100:016x}")
        note(f"numbered {number}", await store.add_span(sent))
    note("number after those below zero", await store.get_next_span_sequence_id(rollout_id, attempt_id))
    note("in order", [each.sequence_id for each in (await store.query_spans(rollout_id)).items])

    async def taken(name: str, call: Awaitable[Any], part: Callable[[Any], Any]) -> None:
        try:
            note(name, part(await call))
        except ClientResponseError as error:
            note(name, error.status)

    for name, number in {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}.items():
        await taken(f"{name} in an input", store.enqueue_rollout([number, 1.5]), lambda each: each.input)
        await taken(f"{name} in metadata", store.start_rollout(1, metadata={"n": number}), lambda each: each.metadata)
        stats = store.update_worker("n2", {"cpu": number, "memory": 1.5})
        await taken(f"{name} in stats", stats, lambda each: each.heartbeat_stats)
        llm = lightning.LLM(endpoint="http://localhost", model="m", sampling_parameters={"temperature": number})
        added = store.add_resources({"main": llm})
        await taken(f"{name} in resources", added, lambda each: each.resources["main"].sampling_parameters)
        config = Config(timeout_seconds=number)
        started = store.start_rollout("for ever", config=config)
        await taken(f"{name} seconds", started, lambda each: each.config.timeout_seconds)


async def statistics(store: Any, note: Facts) -> None:
    found = await store.statistics()
    note("totals", {name: each for name, each in found.items() if name.startswith("total_") and "bytes" not in name})
    note("uptime", 0 < found["uptime"] < 3600)
    note("name", found["name"])


SECTIONS: tuple[Section, ...] = (
    resources,
    queue,
    changes,
    attempts,
    rollouts,
    workers,
    spans,
    waits,
    deadlines,
    revivals,
    errors,
    statistics,
    leniences,
)


async def facts_of(url: str) -> dict[str, dict[str, Any]]:
    """Return the facts found at this URL, by section."""
    # Without retries, since errors are expected.
    store = lightning.LightningStoreClient(url, retry_delays=(), request_timeout=SECONDS)
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        note = Facts()
        await section(store, note)
        found[section.__name__] = note.found
    await store.close()
    return found


async def main(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # It checks for overdue attempts with each request, but by default at most every ten seconds.
    kept = lightning.InMemoryLightningStore(thread_safe=True, scan_debounce_seconds=0.0)
    server = lightning.LightningStoreServer(kept, "127.0.0.1", port)
    await server.start()
    reference, actual = await asyncio.gather(facts_of(server.endpoint), facts_of(url))
    await server.stop()
    sys.stdout.write(json.dumps({"reference": reference, "actual": actual}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
