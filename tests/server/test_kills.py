"""SIGKILL of `agl store`, and of its PostgreSQL, under load: answered writes are kept once, and nothing hangs."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx

from tests.common.postgresql import PostgresServer
from tests.server.process import StoreServer

KILLS = 20
FEW_KILLS = 2
RUNNERS = 8
SPANS = 2


class Unavailable(Exception):
    """Raised if the server refuses for now, or is gone: it may have done the work or not."""


class Load:
    """A client that enqueues rollouts, and several that run them; all remember the answers they got.

    If the server dies and the outcome is unknown, they repeat the request where that is safe.
    """

    def __init__(self, *servers: StoreServer) -> None:
        self._servers = cycle(servers)
        self._enqueuing, self._running = threading.Event(), threading.Event()
        self._span_ids = count()
        self.enqueued: dict[str, int] = {}
        self.tried = 0
        self.taken: list[tuple[str, str]] = []
        self.spans: dict[str, list[str]] = {}
        self.finished: list[str] = []

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(RUNNERS + 1)
        work = (self._enqueue, *(self._run,) * RUNNERS)
        self._done = [self._pool.submit(each, server) for each, server in zip(work, self._servers, strict=False)]
        return self

    def __exit__(self, *_: object) -> None:
        """Empty the queue, then stop."""
        self._enqueuing.set()
        self._done[0].result()
        self._running.set()
        for each in self._done:
            each.result()
        self._pool.shutdown()

    def until_finished(self, more: int) -> None:
        """Wait until this many more rollouts are finished."""
        enough = len(self.finished) + more
        while len(self.finished) < enough:
            for each in self._done:
                if each.done():
                    each.result()
            time.sleep(0.005)

    def _enqueue(self, server: StoreServer) -> None:
        with server.client() as client:
            while not self._enqueuing.is_set():
                numbers = range(self.tried, self.tried + 3)
                self.tried += 3
                try:
                    made = posted(client, "/queues/rollouts/enqueue", {"rollouts": [{"input": n} for n in numbers]})
                except Unavailable:
                    # They may be there or not: they are not enqueued again.
                    time.sleep(0.02)
                    continue
                self.enqueued |= {each["rollout_id"]: each["input"] for each in made}
                time.sleep(0.005)

    def _run(self, server: StoreServer) -> None:
        with server.client() as client:
            while True:
                last = self._running.is_set()
                try:
                    taken = posted(client, "/queues/rollouts/dequeue", {"limit": 1})
                except Unavailable:
                    time.sleep(0.02)
                    continue
                if not taken and last:
                    return
                for each in taken:
                    self._finish(client, each)

    def _finish(self, client: httpx.Client, rollout: Any) -> None:
        rollout_id, attempt_id = rollout["rollout_id"], rollout["attempt"]["attempt_id"]
        self.taken.append((rollout_id, attempt_id))
        self.spans[rollout_id] = []
        for _ in range(SPANS):
            sent = span(rollout_id, attempt_id, f"{next(self._span_ids):016x}")
            until_answered(lambda sent=sent: posted(client, "/spans", sent))
            self.spans[rollout_id].append(sent["span_id"])
        path = f"/rollouts/{rollout_id}/attempts/{attempt_id}"
        until_answered(lambda: posted(client, path, {"status": "succeeded"}))
        self.finished.append(rollout_id)


def posted(client: httpx.Client, path: str, body: Any) -> Any:
    try:
        response = client.post(f"/v1/agl{path}", json=body)
    except httpx.TransportError as error:
        raise Unavailable from error
    if response.status_code == 503:
        raise Unavailable(response.text)
    assert response.is_success, response.text
    return response.json()


def until_answered(ask: Callable[[], object]) -> None:
    while True:
        try:
            ask()
            return
        except Unavailable:
            time.sleep(0.02)


def span(rollout_id: str, attempt_id: str, span_id: str) -> dict[str, Any]:
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": int(span_id, 16),
        "trace_id": "0" * 32,
        "span_id": span_id,
        "parent_id": None,
        "name": "chat",
        "status": {"status_code": "OK"},
        "attributes": {"response_token_ids": list(range(64))},
        "events": [],
        "links": [],
        "start_time": 1.0,
        "end_time": 2.0,
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    }


def all_rollouts(client: httpx.Client) -> Iterator[Any]:
    yield from client.get("/v1/agl/rollouts").raise_for_status().json()["items"]


def test_killed_store_keeps_answered_writes_once(
    tmp_path: Path, new_store: Callable[[Path], str], thorough: bool
) -> None:
    delays = random.Random(8)
    path = tmp_path / "store.db"
    with StoreServer(path, store=new_store(path)) as server:
        with Load(server) as load:
            for _ in range(KILLS if thorough else FEW_KILLS):
                load.until_finished(10)
                time.sleep(delays.uniform(0, 0.1))
                server.kill()
                server.start()
        assert_all_there(server, load)


def test_killed_postgresql_keeps_answered_writes_once(
    tmp_path: Path, postgresql: PostgresServer, thorough: bool
) -> None:
    delays = random.Random(9)
    with StoreServer(tmp_path / "store.db", store=postgresql.new_database()) as server:
        with Load(server) as load:
            for _ in range(KILLS if thorough else FEW_KILLS):
                load.until_finished(10)
                time.sleep(delays.uniform(0, 0.1))
                postgresql.kill()
                postgresql.start()
        assert_all_there(server, load)


def test_one_of_three_servers_killed_keeps_answered_writes_once(
    tmp_path: Path, postgresql: PostgresServer, thorough: bool
) -> None:
    more = 50 if thorough else 20
    url = postgresql.new_database()
    with (
        StoreServer(tmp_path / "one.db", store=url) as one,
        StoreServer(tmp_path / "two.db", store=url) as two,
        StoreServer(tmp_path / "three.db", store=url) as three,
    ):
        with Load(one, two, three) as load:
            load.until_finished(more)
            two.kill()
            # The other servers keep working.
            load.until_finished(more)
            two.start()
            load.until_finished(more)
        assert_all_there(three, load)


def assert_all_there(server: StoreServer, load: Load) -> None:
    """Assert that answered writes are kept once, and that abandoned rollouts are retried."""
    with server.client() as client:
        kept = {each["rollout_id"]: each for each in all_rollouts(client)}
        # Enqueued: all that were confirmed, none twice.
        assert {each: kept[each]["input"] for each in load.enqueued} == load.enqueued
        inputs = Counter(each["input"] for each in kept.values())
        assert set(inputs.values()) == {1}
        assert inputs.keys() <= set(range(load.tried))
        # Run: none by two runners, and all finished ones have succeeded.
        assert len({rollout_id for rollout_id, _ in load.taken}) == len(load.taken)
        for rollout_id, attempt_id in load.taken:
            assert kept[rollout_id]["attempt"]["attempt_id"] == attempt_id
            assert kept[rollout_id]["status"] == "succeeded"
            found = posted(client, "/spans/search", {"rollout_id": rollout_id})["items"]
            assert sorted(each["span_id"] for each in found) == sorted(load.spans[rollout_id])
        # Rollouts dequeued in an answer that got lost send no heartbeats: they are retried.
        lost = [each for each in kept.values() if each["status"] != "succeeded"]
        assert {each["status"] for each in lost} <= {"preparing"}
        assert len(lost) <= KILLS * RUNNERS
        again = {"unresponsive_seconds": 0.001, "max_attempts": 2, "retry_condition": ["unresponsive"]}
        for each in lost:
            posted(client, f"/rollouts/{each['rollout_id']}", {"config": again})
        taken = posted(client, "/queues/rollouts/dequeue", {"limit": 1000})
        while len(taken) < len(lost):
            taken += posted(client, "/queues/rollouts/dequeue", {"limit": 1000})
        assert {each["rollout_id"] for each in taken} == {each["rollout_id"] for each in lost}
