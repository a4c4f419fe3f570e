"""Tests of the queue with two `agl store` servers on one database: order, limits, timeouts and retries."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentlightning.store import Store, open_store
from tests.common.generations import HOSTILE
from tests.server.process import StoreServer

RUNNERS = 8
ROLLOUTS, FEWER_ROLLOUTS = 400, 100
SECONDS = 60

Clients = tuple[httpx.Client, httpx.Client]


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]
) -> Iterator[tuple[StoreServer, StoreServer]]:
    path = tmp_path_factory.mktemp("queue") / "store.db"
    url = new_store(path)
    with StoreServer(path, store=url) as one, StoreServer(path.with_name("other.db"), store=url) as other:
        yield one, other


@pytest.fixture
def clients(servers: tuple[StoreServer, StoreServer]) -> Iterator[Clients]:
    """Open a client of each server. A test that enqueues rollouts dequeues all of them."""
    with servers[0].client() as one, servers[1].client() as other:
        yield one, other


def asked(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(f"/v1/agl{path}", json=body)
    assert answer.is_success, answer.text
    return answer.json()


def enqueue(client: httpx.Client, *inputs: Any, **fields: Any) -> list[str]:
    new = [{"input": each, **fields} for each in inputs]
    return [each["rollout_id"] for each in asked(client, "/queues/rollouts/enqueue", rollouts=new)]


def dequeue(client: httpx.Client, limit: int = 1, **fields: Any) -> list[dict[str, Any]]:
    return asked(client, "/queues/rollouts/dequeue", limit=limit, **fields)


def inputs(client: httpx.Client, limit: int = 1) -> list[Any]:
    return [each["input"] for each in dequeue(client, limit)]


def end(client: httpx.Client, rollout: dict[str, Any], status: str) -> None:
    asked(client, f"/rollouts/{rollout['rollout_id']}/attempts/{rollout['attempt']['attempt_id']}", status=status)


def rollout_of(client: httpx.Client, rollout_id: str) -> dict[str, Any]:
    return client.get(f"/v1/agl/rollouts/{rollout_id}").raise_for_status().json()


def until(client: httpx.Client, rollout_id: str, status: str) -> dict[str, Any]:
    """Wait until a rollout has this status, and return it."""
    deadline = time.monotonic() + SECONDS
    while (found := rollout_of(client, rollout_id))["status"] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_runners_of_two_servers_never_get_the_same_rollout(
    servers: tuple[StoreServer, StoreServer], thorough: bool
) -> None:
    rollouts = ROLLOUTS if thorough else FEWER_ROLLOUTS

    def enqueued(server: StoreServer, name: str) -> list[str]:
        with server.client() as client:
            return [rollout_id for n in range(rollouts // 20) for rollout_id in enqueue(client, *[(name, n)] * 10)]

    def taken(number: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        with servers[number % 2].client() as client:
            while more := dequeue(client, 1 + number % 3, worker_id=f"runner-{number}"):
                found += more
        return found

    with ThreadPoolExecutor(RUNNERS) as pool:
        made = [each for part in pool.map(enqueued, servers, ("one", "other")) for each in part]
        by_runner = list(pool.map(taken, range(RUNNERS)))
    assert Counter(each["rollout_id"] for part in by_runner for each in part) == Counter(made)
    for number, part in enumerate(by_runner):
        for each in part:
            assert each["attempt"]["sequence_id"] == 1
            assert each["attempt"]["worker_id"] == f"runner-{number}"
        for name in ("one", "other"):
            in_turn = [each["input"][1] for each in part if each["input"][0] == name]
            assert in_turn == sorted(in_turn)


def test_queue_is_in_order_of_arrival_over_both_servers(clients: Clients) -> None:
    one, other = clients
    enqueue(one, 1, 2)
    enqueue(other, 3)
    enqueue(one, 4)
    enqueue(other, 5, 6)
    assert inputs(other, 2) + inputs(one, 3) + inputs(other, 3) == [1, 2, 3, 4, 5, 6]


def test_retried_rollouts_come_after_waiting_ones(clients: Clients) -> None:
    one, other = clients
    enqueue(one, "a", "b", "c", config={"max_attempts": 2, "retry_condition": ["failed"]})
    first, second = dequeue(one, 2)
    end(other, second, "failed")
    end(one, first, "failed")
    enqueue(other, "d")
    again = dequeue(other, 10)
    assert [(each["input"], each["attempt"]["sequence_id"]) for each in again] == [
        ("c", 1),
        ("b", 2),
        ("a", 2),
        ("d", 1),
    ]
    end(one, again[1], "failed")
    assert rollout_of(other, second["rollout_id"])["status"] == "failed"
    assert dequeue(one) == []


def test_dequeue_takes_no_more_than_the_limit(clients: Clients) -> None:
    one, other = clients
    enqueue(one, *range(7))
    assert inputs(one, 0) == []
    assert inputs(one, -1) == []
    assert inputs(other, 3) == [0, 1, 2]
    assert one.post("/v1/agl/queues/rollouts/dequeue").json()[0]["input"] == 3
    # A limit above the largest batch works, too.
    assert inputs(other, 10**6) == [4, 5, 6]
    assert inputs(one, 10**6) == []


def test_attempt_with_heartbeats_or_spans_stays_responsive(clients: Clients) -> None:
    one, other = clients
    config = {"unresponsive_seconds": 4, "max_attempts": 2, "retry_condition": ["unresponsive"]}
    enqueue(one, "heard of", "sends spans", "silent", config=config)
    heard_of, sends, silent = dequeue(one, 3, worker_id="keeper")
    number = 0
    while rollout_of(one, silent["rollout_id"])["status"] == "preparing":
        number += 1
        path = f"/rollouts/{heard_of['rollout_id']}/attempts/latest"
        asked(other, path, last_heartbeat_time=time.time())
        asked(other, "/spans", **span(sends, number))
        time.sleep(0.1)
    assert rollout_of(other, silent["rollout_id"])["attempt"]["status"] == "unresponsive"
    assert rollout_of(other, heard_of["rollout_id"])["status"] == "preparing"
    assert rollout_of(one, sends["rollout_id"])["status"] == "running"
    for each in (heard_of, sends):
        assert until(other, each["rollout_id"], "requeuing")["attempt"]["attempt_id"] == each["attempt"]["attempt_id"]
    again = dequeue(other, 10)
    assert again[0]["input"] == "silent"
    assert {each["input"] for each in again[1:]} == {"heard of", "sends spans"}
    assert {each["attempt"]["sequence_id"] for each in again} == {2}
    assert one.get("/v1/agl/workers/keeper").json()["status"] == "unknown"


def span(rollout: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "rollout_id": rollout["rollout_id"],
        "attempt_id": rollout["attempt"]["attempt_id"],
        "sequence_id": number,
        "trace_id": "ab" * 16,
        "span_id": f"{number:016x}",
        "parent_id": None,
        "name": "step",
        "status": {"status_code": "OK"},
        "attributes": {},
        "events": [],
        "links": [],
        "start_time": None,
        "end_time": None,
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    }


def test_attempt_past_its_timeout_ends_despite_spans(clients: Clients) -> None:
    one, other = clients
    [rollout_id] = enqueue(one, "slow", config={"timeout_seconds": 1, "unresponsive_seconds": 900})
    [rollout] = dequeue(other)
    deadline = time.monotonic() + SECONDS
    number = 0
    while (found := rollout_of(one, rollout_id))["status"] in ("preparing", "running"):
        assert time.monotonic() < deadline, found
        number += 1
        asked(other, "/spans", **span(rollout, number))
    assert (found["status"], found["attempt"]["status"]) == ("failed", "timeout")
    assert found["end_time"] - found["attempt"]["start_time"] >= 1
    assert dequeue(other) == []


def test_rollout_waiting_in_the_queue_never_times_out(clients: Clients) -> None:
    one, other = clients
    [rollout_id] = enqueue(one, "waits", config={"timeout_seconds": 0.2, "unresponsive_seconds": 0.1})
    late = asked(one, "/rollouts", input="late", config={"timeout_seconds": 0.2})
    until(other, late["rollout_id"], "failed")
    assert rollout_of(one, rollout_id)["status"] == "queuing"
    asked(other, f"/rollouts/{rollout_id}", status="cancelled")
    assert dequeue(one) == []


def status_of(store: Store, rollout_id: str) -> str | None:
    found = store.get_rollout_by_id(rollout_id)
    return None if found is None else found.status


@pytest.mark.parametrize("over_http", [True, False], ids=["over HTTP", "in the database"])
def test_get_rollout_by_id_gives_the_queues_status(
    servers: tuple[StoreServer, StoreServer], clients: Clients, over_http: bool
) -> None:
    [rollout_id] = enqueue(clients[0], "a task")
    with open_store(servers[0].url if over_http else servers[0].store) as store:
        assert status_of(store, rollout_id) == "queuing"
        dequeue(clients[0])
        assert status_of(store, rollout_id) == "preparing"
        for unknown in (*HOSTILE.values(), "\ud800"):
            assert status_of(store, unknown) is None
