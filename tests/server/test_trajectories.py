"""Tests of the routes of trajectories, of pages of rollouts, and of rewards of recorded rollouts."""

from __future__ import annotations

import json
import uuid
from array import array
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from agentlightning.generation import Choice, Generation
from agentlightning.store import Store, open_store
from agentlightning.trajectory import Trajectory
from tests.common.generations import generation
from tests.server.process import StoreServer

LINES = {"Accept": "application/jsonl"}
# Tests share a server: its other rollouts are of this century.
NEXT_CENTURY = 4_200_000_000_000_000_000


@pytest.fixture
def recorded(store: StoreServer) -> Iterator[Store]:
    """Open the served store as a vLLM server does."""
    with open_store(store.store) as recorded:
        yield recorded


@pytest.fixture
def rollout() -> str:
    """An id that no other test uses."""
    return uuid.uuid4().hex


def call(rollout_id: str, number: int, prompt: list[int], answer: list[int], **fields: Any) -> Generation:
    choice = Choice(token_ids=array("i", answer), logprobs=array("f", [-0.5] * len(answer)), finish_reason="stop")
    ids = {"rollout_id": rollout_id, "attempt_id": "a"}
    return generation(number, **{**ids, "prompt_token_ids": array("i", prompt), "choices": [choice], **fields})


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_trajectories_of_a_rollout_are_items_or_lines(client: httpx.Client, recorded: Store, rollout: str) -> None:
    recorded.add([call(rollout, 1, [1, 2], [3]), call(rollout, 2, [1, 2, 3, 4], [5]), call(rollout, 3, [1], [])])
    (row,) = recorded.trajectories(rollout)

    for path in (f"/v1/agl/rollouts/{rollout}/trajectories", f"/v1/agl/rollouts/{rollout}/attempts/a/trajectories"):
        answer = client.get(path).json()
        assert [Trajectory.from_dict(each) for each in answer["items"]] == [row]
        assert [each["reason"] for each in answer["left_out"]] == ["empty_answer"]
        assert [Trajectory.from_dict(each) for each in lines(client.get(path, headers=LINES))] == [row]
    assert client.get(f"/v1/agl/rollouts/{rollout}/attempts/b/trajectories").json() == {"items": [], "left_out": []}
    transition = client.get(f"/v1/agl/rollouts/{rollout}/trajectories", params={"drift": "transition"}).json()
    assert [each["response_mask"] for each in transition["items"]] == [[0, 0, 1], [0, 0, 0, 0, 1]]


def test_an_attempt_without_rows_says_which_calls_it_has(client: httpx.Client, recorded: Store, rollout: str) -> None:
    empty = call(rollout, 1, [1], [])
    recorded.add([empty])

    assert client.get(f"/v1/agl/rollouts/{rollout}/trajectories").json() == {
        "items": [],
        "left_out": [{"generation_id": empty.id, "index": 0, "reason": "empty_answer", "reward": None}],
    }


def test_all_rollouts_are_read_page_by_page_with_a_cursor(client: httpx.Client, recorded: Store, rollout: str) -> None:
    names = [f"größe/{rollout}", f"b{rollout}", f"c{rollout}"]
    recorded.add([call(name, n, [1], [2], finished_at=NEXT_CENTURY + n) for n, name in enumerate(names)])
    for route in ("/v1/agl/trajectories", "/v1/agl/triplets"):
        found: list[list[str]] = []
        page: dict[str, Any] = {"limit": 2, "since": NEXT_CENTURY}
        while True:
            answer = client.get(route, params=page)
            found.append([each["rollout_id"] for each in lines(answer)])
            if "x-agl-next" not in answer.headers:
                break
            page["after"] = unquote(answer.headers["x-agl-next"])

        assert found == [names[:2], names[2:]]
        assert client.get(route, params={"after": "nobody"}).status_code == 404
        assert client.get(route, params={"limit": 0}).status_code == 422


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"drift": "guess"}, "drift"),
        ({"max_length": -1}, "max_length"),
        ({"max_staleness": 1}, "max_staleness: needs a weight_version"),
        ({"min_reward": "nan"}, "min_reward"),
        ({"max_lenght": 1}, "max_lenght"),
    ],
)
def test_senseless_options_are_refused_with_a_sentence(
    client: httpx.Client, params: dict[str, Any], words: str
) -> None:
    for path in ("/v1/agl/trajectories", "/v1/agl/rollouts/r/trajectories"):
        answer = client.get(path, params=params)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


def test_a_rollout_that_was_only_recorded_is_rewarded(client: httpx.Client, recorded: Store, rollout: str) -> None:
    first = call(rollout, 1, [1, 2], [3])
    recorded.add([first, call(rollout, 2, [1, 2, 3, 4], [5])])

    assert client.post(f"/v1/agl/rollouts/{rollout}/reward", json={"value": 1.0}).status_code == 201
    body = {"value": 0.5, "generation_id": first.id}
    assert client.post(f"/v1/agl/rollouts/{rollout}/attempts/a/reward", json=body).status_code == 201
    assert client.post("/v1/agl/rollouts/nobody/reward", json={"value": 1.0}).status_code == 404

    (row,) = client.get(f"/v1/agl/rollouts/{rollout}/trajectories").json()["items"]
    assert (row["reward"], [each["reward"] for each in row["rewards"]]) == (1.0, [0.5, 1.0])


def test_triplets_are_filtered(client: httpx.Client, recorded: Store, rollout: str) -> None:
    recorded.add([call(rollout, 1, [1], [2]), call(rollout, 2, [1], [3], status="aborted")])

    paths = (
        "/v1/agl/triplets",
        f"/v1/agl/rollouts/{rollout}/triplets",
        f"/v1/agl/rollouts/{rollout}/attempts/a/triplets",
    )
    for path in paths:
        of_rollout = {"rollout_id": rollout} if path == paths[0] else {}
        found = lines(client.get(path, params={**of_rollout, "status": "aborted"}, headers=LINES))
        assert [(each["response_token_ids"], each["finish_reason"]) for each in found] == [([3], "stop")]
        assert lines(client.get(path, params={**of_rollout, "min_reward": 0}, headers=LINES)) == []
