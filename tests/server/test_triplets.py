"""Tests of the routes of triplets and rewards, and of spans that are returned with recorded token ids."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentlightning.generation import Choice, Generation
from agentlightning.store import Store, open_store
from tests.common.generations import generation
from tests.common.vllm import without_agl
from tests.server.process import StoreServer
from tests.server.test_malformed import A_SPAN as SPAN
from tests.server.test_otlp import a_span, attribute, new_id, of_rollout, post_json, spans_of

LINES = {"Accept": "application/jsonl"}
# After the end of the spans.
FINISHED = 1_700_000_001_500_000_000


@pytest.fixture
def recorded(store: StoreServer) -> Iterator[Store]:
    """Open the served store as a vLLM server does."""
    with open_store(store.store) as recorded:
        yield recorded


def an_attempt(client: httpx.Client) -> tuple[str, str]:
    made = client.post("/v1/agl/rollouts", json={"input": 1}).json()
    return made["rollout_id"], made["attempt"]["attempt_id"]


def calls(how_many: int, **fields: Any) -> list[Generation]:
    """Make calls that name no rollout, each with a new response id."""
    usual: dict[str, Any] = {"rollout_id": None, "attempt_id": None}
    return [
        generation(n, **{**usual, "finished_at": FINISHED + n, "response_id": new_id("chatcmpl"), **fields})
        for n in range(how_many)
    ]


def send_span(client: httpx.Client, rollout_id: str, attempt_id: str, answer: str | None, **fields: Any) -> None:
    """Send the span of a call by OTLP."""
    attrs = [] if answer is None else [attribute("gen_ai.response.id", "stringValue", answer)]
    span = {"name": "openai.chat.completion", **fields}
    assert post_json(client, a_span(attributes=[*of_rollout(rollout_id, attempt_id), *attrs], **span)) == {}


def triplets_of(client: httpx.Client, rollout_id: str, attempt_id: str | None = None) -> list[dict[str, Any]]:
    """Read triplets as JSON, and check that JSON Lines have the same."""
    part = "" if attempt_id is None else f"/attempts/{attempt_id}"
    path = f"/v1/agl/rollouts/{rollout_id}{part}/triplets"
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    items = answer.json()["items"]
    lines = client.get(path, headers=LINES)
    assert lines.headers["content-type"] == "application/jsonl"
    assert [json.loads(line) for line in lines.text.splitlines()] == items
    return items


def reward(client: httpx.Client, rollout_id: str, attempt_id: str = "latest", **body: Any) -> httpx.Response:
    return client.post(f"/v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}/reward", json=body)


def test_triplets_of_a_rollout_are_its_calls_with_rewards(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    choice = Choice(
        token_ids=array("i", [7, 8]), logprobs=array("f", [-0.5, float("-inf")]), weight_versions=[("v1", 0, 2)]
    )
    first, second = calls(2, choices=[choice], status="aborted")
    recorded.add([first, second])
    for each in (second, first):
        send_span(client, rollout_id, attempt_id, each.response_id)
    assert reward(client, rollout_id, value=1).status_code == 201

    spans = spans_of(client, rollout_id=rollout_id)
    expected = [
        {
            "generation_id": each.id,
            "response_id": each.response_id,
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            **dict.fromkeys(("agent_id", "parent_agent_id", "purpose", "retry")),
            "index": 0,
            "status": "aborted",
            "finish_reason": None,
            "model": "tiny-model",
            "prompt_token_ids": list(each.prompt_token_ids or ()),
            "response_token_ids": [7, 8],
            "logprobs": [-0.5, None],
            "reward": value,
            "span_id": span["span_id"],
            "weight_versions": [{"version": "v1", "start": 0, "end": 2}],
            "routed_experts": None,
            "sampling_mask": None,
            "input": 1,
            "metadata": {},
        }
        for each, value, span in zip((second, first), (None, 1.0), spans, strict=False)
    ]
    assert triplets_of(client, rollout_id) == expected
    assert triplets_of(client, rollout_id, attempt_id) == triplets_of(client, rollout_id, "latest") == expected


def test_triplets_of_a_rollout_unknown_to_the_queue_are_listed(client: httpx.Client, recorded: Store) -> None:
    rollout_id = new_id("ours")
    recorded.add(calls(2, rollout_id=rollout_id, attempt_id="a"))

    assert [each["attempt_id"] for each in triplets_of(client, rollout_id, "a")] == ["a", "a"]
    assert len(triplets_of(client, rollout_id)) == 2
    assert triplets_of(client, rollout_id, "b") == triplets_of(client, rollout_id, "latest") == []
    assert triplets_of(client, new_id("unknown")) == []


def test_all_triplets_are_lines_grouped_by_rollout(client: httpx.Client, recorded: Store) -> None:
    first, second = new_id("a/b"), new_id("c")
    recorded.add(calls(3, rollout_id=second) + calls(2, rollout_id=first, finished_at=FINISHED - 1))

    answer = client.get("/v1/agl/triplets")
    assert answer.headers["content-type"] == "application/jsonl"
    found = [json.loads(line) for line in answer.text.splitlines()]
    ours = [each["rollout_id"] for each in found if each["rollout_id"] in (first, second)]
    # In the order in which they arrived: a call that comes late moves no rollout that was read before.
    assert ours == [second] * 3 + [first] * 2
    # An id with a slash does not fit into a path.
    one = client.get("/v1/agl/triplets", params={"rollout_id": first})
    assert [json.loads(line) for line in one.text.splitlines()] == [
        each for each in found if each["rollout_id"] == first
    ]
    assert client.get("/v1/agl/triplets", params={"rollout_id": first, "attempt_id": "a"}).text == ""


def test_store_over_http_has_the_same_triplets(store: StoreServer, client: httpx.Client, recorded: Store) -> None:
    rollout_id = new_id("a/b?c")
    logprobs = array("f", [float("-inf"), -0.1])
    versions = [("v1", 0, 1), ("v2", 1, 2)]
    choice = Choice(token_ids=array("i", [7, 8]), logprobs=logprobs, weight_versions=versions)
    recorded.add(calls(3, rollout_id=rollout_id, attempt_id="a", choices=[choice]))

    with open_store(store.url) as remote:
        found = [*remote.triplets(rollout_id)]
        assert found == [*recorded.triplets(rollout_id)] == [*remote.triplets(rollout_id, "a")]
        assert len(found) == 3
        assert [*remote.triplets(rollout_id, "b")] == []
        # Texts that the queue does not accept as ids.
        assert [*remote.triplets("x" * 600)] == [*remote.triplets("")] == [*recorded.triplets("x" * 600)] == []
        assert [each for each in remote.triplets() if each.rollout_id == rollout_id] == found


def test_post_of_a_reward_returns_its_span_and_the_last_counts(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    new = calls(3, rollout_id=rollout_id, attempt_id=attempt_id)
    recorded.add(new)
    answers = [reward(client, rollout_id, value=value, generation_id=new[1].id) for value in (0.25, 0.5)]
    # The outcome arrives before the spans, which are sent some time after they end.
    outcome = reward(client, rollout_id, attempt_id, value=-1)
    send_span(client, rollout_id, attempt_id, new[2].response_id)

    assert [each.status_code for each in (*answers, outcome)] == [201] * 3
    kept = spans_of(client, rollout_id=rollout_id, name="agentlightning.annotation")
    assert kept == [each.json() for each in (*answers, outcome)]
    assert (kept[0]["attempt_id"], kept[0]["attributes"]["agentlightning.generation_id"]) == (attempt_id, new[1].id)
    assert [each["reward"] for each in triplets_of(client, rollout_id)] == [None, 0.5, -1.0]
    assert client.get(f"/v1/agl/rollouts/{rollout_id}").json()["status"] == "running"


@pytest.mark.parametrize("calls_before", [0, 2])
def test_reward_stays_on_the_last_call_when_its_span_arrives_later(
    client: httpx.Client, recorded: Store, calls_before: int
) -> None:
    """A BatchSpanProcessor sends after five seconds, the runner of 0.3 immediately."""
    rollout_id, attempt_id = an_attempt(client)
    new = calls(calls_before + 1, rollout_id=rollout_id, attempt_id=attempt_id)
    recorded.add(new)
    times = [{f"{each}TimeUnixNano": f"{1_700_000_000 + n}000000000" for each in ("start", "end")} for n in range(3)]
    for n, each in enumerate(new[:-1]):
        send_span(client, rollout_id, attempt_id, each.response_id, **times[n])
    ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    number = client.post("/v1/agl/spans/next", json=ids).json()["sequence_id"]
    given = {
        **SPAN,
        **ids,
        "sequence_id": number,
        "span_id": uuid.uuid4().hex[:16],
        "name": "agentlightning.annotation",
        "attributes": {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 1.0},
        "start_time": 1_700_000_010.0,
        "end_time": 1_700_000_010.0,
    }
    assert client.post("/v1/agl/spans", json=given).status_code == 201
    before = [each["reward"] for each in triplets_of(client, rollout_id)]
    send_span(client, rollout_id, attempt_id, new[-1].response_id, **times[calls_before])

    found = triplets_of(client, rollout_id)
    assert before == [each["reward"] for each in found] == [None] * calls_before + [1.0]
    assert all(each["span_id"] for each in found)


@pytest.mark.parametrize("value", [None, "1", True, [], "NaN"], ids=str)
def test_post_of_a_reward_that_is_not_a_number_is_refused(client: httpx.Client, value: Any) -> None:
    rollout_id, _ = an_attempt(client)

    answer = reward(client, rollout_id, value=value)
    assert answer.status_code == 422
    assert "value" in answer.json()["detail"]
    assert spans_of(client, rollout_id=rollout_id) == []


@pytest.mark.parametrize(("text", "statuses"), [("NaN", (400,)), ("1e400", (400,)), ("1" + "0" * 400, (400, 422))])
def test_post_of_an_infinite_reward_is_refused(client: httpx.Client, text: str, statuses: tuple[int, ...]) -> None:
    rollout_id, _ = an_attempt(client)
    path = f"/v1/agl/rollouts/{rollout_id}/attempts/latest/reward"
    answer = client.post(path, content=f'{{"value": {text}}}', headers={"Content-Type": "application/json"})
    assert answer.status_code in statuses


def test_post_of_a_reward_for_an_unknown_id_is_not_found(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    other = generation(1, rollout_id=f"another than {rollout_id}")
    recorded.add([other])
    of_another = other.id
    for answer, name in (
        (reward(client, "unknown", value=1), "unknown"),
        (reward(client, rollout_id, "another", value=1), "another"),
        (reward(client, rollout_id, attempt_id, value=1, generation_id="none"), "none"),
        (reward(client, rollout_id, attempt_id, value=1, generation_id=str(uuid.uuid4())), "generation"),
        (reward(client, rollout_id, attempt_id, value=1, generation_id=of_another), of_another),
    ):
        assert answer.status_code == 404
        assert name in answer.json()["detail"]
    assert spans_of(client, rollout_id=rollout_id) == []


@pytest.mark.parametrize("spans_first", [True, False])
def test_span_that_names_an_answer_is_returned_with_its_ids(
    client: httpx.Client, recorded: Store, spans_first: bool
) -> None:
    rollout_id, attempt_id = an_attempt(client)
    choices = [Choice(index=n, token_ids=array("i", [n, 8]), logprobs=array("f", [-0.5, -0.25])) for n in range(2)]
    [kept] = calls(1, choices=choices)
    if not spans_first:
        recorded.add([kept])
    send_span(client, rollout_id, attempt_id, kept.response_id)
    send_span(client, rollout_id, attempt_id, "unknown")
    send_span(client, rollout_id, attempt_id, None)
    if spans_first:
        recorded.add([kept])

    found = spans_of(client, rollout_id=rollout_id)
    attrs = found[0]["attributes"]
    assert attrs["gen_ai.response.id"] == kept.response_id
    assert attrs["prompt_token_ids"] == list(kept.prompt_token_ids or ())
    assert attrs["response_token_ids"] == [0, 8]
    assert json.loads(attrs["logprobs.content"]) == [{"logprob": -0.5}, {"logprob": -0.25}]
    assert all("prompt_token_ids" not in each["attributes"] for each in found[1:])
    assert client.post("/v1/agl/spans/search", json={"rollout_id": rollout_id}).json()["items"] == found


def test_spans_that_name_a_shared_response_id_are_returned_without_ids(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    recorded.add(new := calls(2, rollout_id=rollout_id, attempt_id=attempt_id, response_id=new_id("chatcmpl")))
    for each in new:
        send_span(client, rollout_id, attempt_id, each.response_id)

    found = spans_of(client, rollout_id=rollout_id)
    assert all("response_token_ids" not in each["attributes"] for each in found)
    # Only all calls of the rollout together show which span belongs to which call.
    assert [(each["generation_id"], each["span_id"]) for each in triplets_of(client, rollout_id)] == [
        (call.id, span["span_id"]) for call, span in zip(new, found, strict=True)
    ]


def test_call_of_another_rollout_gets_no_reward_though_a_span_names_it(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    answer = new_id("chatcmpl")
    [ours] = calls(1, rollout_id=rollout_id, attempt_id=attempt_id, response_id=answer)
    [other] = calls(1, rollout_id=new_id("another"), response_id=answer)
    recorded.add([ours, other])
    send_span(client, rollout_id, attempt_id, answer)

    assert reward(client, rollout_id, value=1, generation_id=other.id).status_code == 404
    assert reward(client, rollout_id, value=1, generation_id=ours.id).status_code == 201
    assert [(each["generation_id"], each["reward"]) for each in triplets_of(client, rollout_id)] == [(ours.id, 1.0)]


def test_span_keeps_the_ids_that_it_arrived_with(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    [kept] = calls(1)
    recorded.add([kept])
    ids = attribute("response_token_ids", "arrayValue", {"values": [{"intValue": "1"}]})
    attrs = [*of_rollout(rollout_id, attempt_id), attribute("gen_ai.response.id", "stringValue", kept.response_id), ids]
    post_json(client, a_span(attributes=attrs))

    [found] = spans_of(client, rollout_id=rollout_id)
    assert found["attributes"]["response_token_ids"] == [1]
    assert found["attributes"]["prompt_token_ids"] == list(kept.prompt_token_ids or ())


def test_many_spans_are_each_returned_with_their_ids(client: httpx.Client, recorded: Store) -> None:
    rollout_id, attempt_id = an_attempt(client)
    new = calls(150)
    recorded.add(new)
    for each in new:
        send_span(client, rollout_id, attempt_id, each.response_id)

    found = spans_of(client, rollout_id=rollout_id)
    assert [each["attributes"]["prompt_token_ids"][0] for each in found] == [*range(150)]


@pytest.mark.tier("all", new_store="postgresql")
def test_adapter_of_agent_lightning_finds_the_same_triplets(
    store: StoreServer, client: httpx.Client, recorded: Store, lightning: Path
) -> None:
    rollout_id, attempt_id = an_attempt(client)
    new = [
        generation(
            n,
            finished_at=FINISHED + n,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            response_id=new_id("chatcmpl"),
            choices=[Choice(token_ids=array("i", [n, 8]), logprobs=array("f", [-0.5, -n / 4]))],
        )
        for n in range(4)
    ]
    recorded.add(new)
    for n, each in enumerate(new):
        times = {
            "startTimeUnixNano": f"{1_700_000_000 + n}000000000",
            "endTimeUnixNano": f"{1_700_000_000 + n}500000000",
        }
        send_span(client, rollout_id, attempt_id, each.response_id, **times)
        if n == 1:
            emitted = [
                attribute("agentlightning.reward.0.name", "stringValue", "primary"),
                attribute("agentlightning.reward.0.value", "doubleValue", 0.25),
            ]
            moment = "1700000001750000000"
            span = a_span(attributes=[*of_rollout(rollout_id, attempt_id), *emitted], name="agentlightning.annotation")
            post_json(client, {**span, "startTimeUnixNano": moment, "endTimeUnixNano": moment})
    given = reward(client, rollout_id, value=0.5).json()

    environment = {**without_agl(os.environ), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).parent / "lightning" / "triplets.py"
    done = subprocess.run(
        [lightning / "python", script, store.url, rollout_id],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = triplets_of(client, rollout_id)
    assert found["triplets"] == [{name: each[name] for name in found["triplets"][0]} for each in ours]
    assert [each["reward"] for each in ours] == [None, 0.25, None, 0.5]
    assert found["final_reward"] == 0.5
    # The posted reward equals what Agent Lightning's `emit_reward` makes.
    outcome = {**given["attributes"]}
    assert outcome.pop("agentlightning.outcome") is True
    assert found["emitted"] == {"name": given["name"], "attributes": outcome, "status": given["status"]}


def test_unknown_filter_is_refused(client: httpx.Client) -> None:
    answer = client.get("/v1/agl/triplets", params={"rollout": "ro-1"})
    assert answer.status_code == 422
    assert "rollout" in answer.json()["detail"]
