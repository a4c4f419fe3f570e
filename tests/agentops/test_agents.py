"""Real agents on a real vLLM, traced by the real AgentOps SDK: every model call has its exact ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.agentops.conftest import Run
from tests.recording.server import RecordingServer, until
from tests.server.process import StoreServer

pytestmark = pytest.mark.tier("all")

PARSER = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The store of both vLLM and the SDK."""
    with StoreServer(tmp_path_factory.mktemp("store") / "store.db", "--agentops") as server:
        yield server


@pytest.fixture(scope="module")
def vllm(store: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    with RecordingServer(tmp_path_factory.mktemp("vllm") / "unused.db", *PARSER, store=store.url) as server:
        yield server


@pytest.fixture(scope="module")
def two_agents(store: StoreServer, vllm: RecordingServer, run_sdk: Run) -> dict[str, Any]:
    """The output of the agents."""
    output = run_sdk(store, "two_agents.py", vllm.url, vllm.model)
    for call in output["calls"]:
        until(lambda call=call: vllm.kept(response_id=call["id"]), "a recording by vLLM")
    return output


def spans_of(client: httpx.Client, trace_id: str) -> list[dict[str, Any]]:
    return client.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["items"]


def test_model_calls_of_two_agents_have_their_exact_ids(client: httpx.Client, two_agents: dict[str, Any]) -> None:
    spans = spans_of(client, two_agents["trace_id"])
    [place] = {(each["rollout_id"], each["attempt_id"]) for each in spans}
    triplets = client.get(f"/v1/agl/rollouts/{place[0]}/attempts/{place[1]}/triplets").json()["items"]

    assert [(each["response_id"], each["response_token_ids"]) for each in triplets] == [
        (call["id"], call["token_ids"]) for call in two_agents["calls"]
    ]
    of_calls = [each for each in spans if "gen_ai.response.id" in each["attributes"]]
    assert {each["attributes"]["gen_ai.response.id"]: each["span_id"] for each in of_calls} == {
        each["response_id"]: each["span_id"] for each in triplets
    }
    assert [each["attributes"]["response_token_ids"] for each in of_calls] == [
        call["token_ids"] for call in two_agents["calls"]
    ]


def test_session_has_all_spans(client: httpx.Client, two_agents: dict[str, Any]) -> None:
    spans = spans_of(client, two_agents["trace_id"])
    names = sorted(each["name"] for each in spans)
    rollout = client.get(f"/v1/agl/rollouts/{spans[0]['rollout_id']}").json()

    assert names == sorted(
        [
            "two agents.session",
            "Reporter.agent",
            "Writer.agent",
            "weather.tool",
            "tool_call.weather",
            *["openai.chat.completion"] * 4,
        ]
    )
    assert [each["name"] for each in spans if each["status"]["status_code"] == "ERROR"] == ["openai.chat.completion"]
    assert rollout["status"] == "succeeded"


def test_validation_of_the_sdk_finds_the_session(two_agents: dict[str, Any]) -> None:
    validated = two_agents["validated"]
    response = sum(len(call["token_ids"]) for call in two_agents["calls"])

    assert "two agents.session" in validated["names"]
    assert validated["has_llm_spans"]
    assert validated["metrics"]["completion_tokens"] == response
    assert validated["metrics"]["total_tokens"] == validated["metrics"]["prompt_tokens"] + response


def test_page_shows_the_session_and_links_to_its_output(client: httpx.Client, two_agents: dict[str, Any]) -> None:
    page = client.get("/sessions", params={"trace_id": two_agents["trace_id"]}).text
    [logs] = [part.partition('"')[0] for part in page.split('<a href="') if part.startswith("./v4/logs/")]

    for call in two_agents["calls"]:
        assert f"{call['id']}: " in page
    assert page.count("recorded by vLLM") == len(two_agents["calls"])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "<i>NotFoundError</i>" in client.get(logs.removeprefix(".")).text


def test_session_joins_the_rollout_named_in_the_environment(
    store: StoreServer, vllm: RecordingServer, client: httpx.Client, run_sdk: Run
) -> None:
    made = client.post("/v1/agl/rollouts", json={"input": 1}).json()
    headers = f"x-agl-rollout-id={made['rollout_id']},x-agl-attempt-id={made['attempt']['attempt_id']}"
    output = run_sdk(store, "two_agents.py", vllm.url, vllm.model, OTEL_EXPORTER_OTLP_HEADERS=headers)
    for call in output["calls"]:
        until(lambda call=call: vllm.kept(response_id=call["id"]), "a recording by vLLM")
    triplets = client.get(f"/v1/agl/rollouts/{made['rollout_id']}/triplets").json()["items"]

    assert [each["response_token_ids"] for each in triplets] == [call["token_ids"] for call in output["calls"]]
    assert {each["attempt_id"] for each in spans_of(client, output["trace_id"])} == {made["attempt"]["attempt_id"]}


def test_openai_agents_sdk_calls_have_their_ids(
    store: StoreServer, vllm: RecordingServer, client: httpx.Client, run_sdk: Run
) -> None:
    output = run_sdk(store, "openai_agents.py", vllm.url, vllm.model)
    spans = spans_of(client, output["trace_id"])
    [rollout_id] = {each["rollout_id"] for each in spans}
    answers = {each["attributes"]["gen_ai.response.id"] for each in spans if "gen_ai.response.id" in each["attributes"]}
    for answer in answers:
        until(lambda answer=answer: vllm.kept(response_id=answer), "a recording by vLLM")
    triplets = client.get(f"/v1/agl/rollouts/{rollout_id}/triplets").json()["items"]
    recorded = {each.response_id: each for answer in answers for each in vllm.kept(response_id=answer)}

    assert len(triplets) == len(output["texts"]) == len(answers) == 2
    for triplet, text in zip(triplets, output["texts"], strict=True):
        [choice] = recorded[triplet["response_id"]].choices
        assert choice.text == text
        assert triplet["response_token_ids"] == list(choice.token_ids or ())
    assert {each["name"] for each in spans} >= {"writer", "openai agents.session"}
