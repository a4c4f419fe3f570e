"""Servers with different clocks on one PostgreSQL, whose clock alone counts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.common.clock import an_hour_ahead
from tests.common.postgresql import PostgresServer
from tests.server.process import StoreServer

HALF_AN_HOUR = 1800


@pytest.fixture(scope="module")
def clients(
    tmp_path_factory: pytest.TempPathFactory, postgresql: PostgresServer
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients of two servers, the second with a clock that is an hour ahead."""
    url = postgresql.new_database()
    folder = tmp_path_factory.mktemp("clocks")
    with (
        StoreServer(folder / "right.db", store=url) as right,
        StoreServer(folder / "ahead.db", store=url, env=an_hour_ahead()) as ahead,
        right.client() as one,
        ahead.client() as other,
    ):
        yield one, other


def posted(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(f"/v1/agl{path}", json=body)
    assert answer.is_success, answer.text
    return answer.json()


def test_second_server_has_a_wrong_clock() -> None:
    """Check that the clock is wrong: otherwise these tests would prove nothing."""
    command = [sys.executable, "-c", "import time; print(time.time())"]
    output = subprocess.run(command, env=dict(an_hour_ahead()), capture_output=True, text=True, check=True).stdout
    assert float(output) - time.time() > HALF_AN_HOUR


def test_clock_of_another_server_times_out_no_attempt(
    clients: tuple[httpx.Client, httpx.Client],
) -> None:
    right, ahead = clients
    config = {"timeout_seconds": HALF_AN_HOUR, "unresponsive_seconds": HALF_AN_HOUR}
    for first, second in ((right, ahead), (ahead, right)):
        begun = posted(first, "/rollouts", input=1, config=config)

        for client in (second, first):
            found = client.get(f"/v1/agl/rollouts/{begun['rollout_id']}").json()
            assert found["status"] == found["attempt"]["status"] == "preparing"


def test_overdue_attempt_times_out_on_both_servers(clients: tuple[httpx.Client, httpx.Client]) -> None:
    right, ahead = clients
    for first, second in ((right, ahead), (ahead, right)):
        begun = posted(first, "/rollouts", input=1, config={"timeout_seconds": 0.01})
        while second.get(f"/v1/agl/rollouts/{begun['rollout_id']}").json()["attempt"]["status"] != "timeout":
            time.sleep(0.01)


def test_rollouts_are_dequeued_in_order_of_arrival(clients: tuple[httpx.Client, httpx.Client]) -> None:
    right, ahead = clients
    for number, client in enumerate((ahead, right, ahead, right)):
        posted(client, "/queues/rollouts/enqueue", rollouts=[{"input": number}])

    taken = [each["input"] for client in (right, ahead) for each in posted(client, "/queues/rollouts/dequeue", limit=2)]
    assert taken == [0, 1, 2, 3]


def test_latest_resources_are_the_last_to_arrive(clients: tuple[httpx.Client, httpx.Client]) -> None:
    right, ahead = clients
    for name, client in (("a", ahead), ("b", right), ("c", ahead), ("d", right)):
        template = {"resource_type": "prompt_template", "template": name, "engine": "f-string"}
        made = posted(client, "/resources", prompt=template)
        for each in clients:
            assert each.get("/v1/agl/resources/latest").json()["resources_id"] == made["resources_id"]
