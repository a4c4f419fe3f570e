"""A real vLLM's sampling parameters (`AGL_SAMPLING`), and the names of its model (`AGL_MODEL_NAMES`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from openai import OpenAI

import agentlightning as agl
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from agentlightning.sampling import is_same
from tests.common.answers import fetch, post, steady
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

PINNED = "temperature=1,top_p=1,top_k=-1,min_p=0,repetition_penalty=1"
# As a model's own generation config would have it.
GENERATION_CONFIG = '--override-generation-config={"top_p": 0.5, "repetition_penalty": 1.3}'
ROUTES = ("--enable-scale-out",)
FROM_CONFIG = {"repetition_penalty": 1.3}
NEUTRAL = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
OTHER = {"temperature": 0, "top_p": 0.3, "top_k": 2, "min_p": 0.2, "repetition_penalty": 1.7}
CHAT = [{"role": "user", "content": "Paris?"}]
# Of each endpoint the body beside the sampling parameters, and which of these it takes.
ALL = tuple(NEUTRAL)
ENDPOINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": ({"messages": CHAT, "max_tokens": 12}, ALL),
    "/v1/completions": ({"prompt": "Paris?", "max_tokens": 12}, ALL),
    "/v1/responses": ({"input": "Paris?", "max_output_tokens": 12}, ("temperature", "top_p", "top_k")),
    "/v1/messages": ({"messages": CHAT, "max_tokens": 12}, ("temperature", "top_p", "top_k")),
    "/inference/v1/generate": ({"token_ids": [1, 87, 85, 275]}, ALL),
    "/v1/chat/completions/batch": ({"messages": [CHAT, CHAT], "max_tokens": 12}, ALL),
}


@pytest.fixture(scope="module")
def pinned(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    env = {"AGL_SAMPLING": PINNED, "AGL_MODEL_NAMES": "any", "AGL_RETURN_TOKEN_IDS": "none"}
    path = tmp_path_factory.mktemp("pinned") / "generations.db"
    with nursery.server(path, GENERATION_CONFIG, *ROUTES, env=env) as server:
        yield server


def body_of(server: RecordingServer, endpoint: str, params: dict[str, Any]) -> dict[str, Any]:
    fields, names = ENDPOINTS[endpoint]
    chosen = {name: params[name] for name in names if name in params} | {"seed": 7}
    if endpoint == "/inference/v1/generate":
        return {"model": server.model, **fields, "sampling_params": {**chosen, "max_tokens": 12}}
    return {"model": server.model, **fields, **chosen}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_request_is_drawn_with_what_is_pinned_whatever_it_asks_for(pinned: RecordingServer, endpoint: str) -> None:
    before = pinned.recorded()
    for params in (NEUTRAL, OTHER, {}):
        post(pinned, endpoint, body_of(pinned, endpoint, params))

    known = {each.id for each in before}
    new = [each for each in pinned.recorded() if each.id not in known and each.prompt_text != "last"]
    neutral, other, nothing = (new[:1], new[1:2], new[2:3]) if len(new) == 3 else (new[:2], new[2:4], new[4:6])
    for one, two, three in zip(neutral, other, nothing, strict=True):
        # Neither all interfaces nor a batch have seeds that can be compared.
        if endpoint not in ("/v1/messages", "/v1/responses"):
            assert one.choices[0].token_ids == two.choices[0].token_ids == three.choices[0].token_ids
        for each in (one, two, three):
            ran = json.loads(each.sampling_params or "{}")
            assert {name: ran.get(name, NEUTRAL[name]) for name in NEUTRAL} == NEUTRAL | {"top_k": ran.get("top_k", -1)}
            assert ran.get("top_k", -1) <= 0
        asked = json.loads(two.requested_params or "{}")
        # What an interface has no field for is the generation config's.
        expected = OTHER | (FROM_CONFIG if "repetition_penalty" not in ENDPOINTS[endpoint][1] else {})
        assert asked == {name: expected[name] for name in asked}
        assert asked.keys() >= set(ENDPOINTS[endpoint][1])


def test_a_rollouts_own_pins_arrive_and_are_sampled_with(pinned: RecordingServer) -> None:
    by_mode = {"train": {"temperature": 0.7}, "val": "client", "test": {"temperature": 1.3, "top_k": 5}}
    resources = {"main": {"resource_type": "llm", "model": "m", "endpoint": "e", "sampling": by_mode}}
    own = agl.RolloutConfig(sampling={"temperature": 0.7})
    greedy, warm = {"temperature": 0, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}

    def ids_of(rollout: agl.Rollout, asked: dict[str, Any], by_key: bool = False) -> list[int]:
        """Return the ids of an answer to the rollout's agent, which names the rollout by its base URL or its key."""
        url = f"{pinned.url}/v1" if by_key else rollout.base_url(pinned.url)
        with OpenAI(base_url=url, api_key=rollout.api_key("k") if by_key else "k", max_retries=0) as client:
            client.completions.create(model=pinned.model, prompt="Paris?", max_tokens=12, seed=7, **asked)
        return [*(pinned.recorded(rollout_id=rollout.rollout_id)[-1].choices[0].token_ids or ())]

    def params_of(rollout: agl.Rollout) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return what ran and changes the model's distribution, and what was asked for in place of what was pinned."""
        found = pinned.recorded(rollout_id=rollout.rollout_id)[-1]
        ran, asked = json.loads(found.sampling_params or "{}"), found.requested_params
        changing = {name: ran[name] for name in NEUTRAL if name in ran and not is_same(name, ran[name], NEUTRAL[name])}
        return changing, None if asked is None else json.loads(asked)

    with agl.open_store(pinned.store) as store:
        of_resources = store.add_resources(resources).resources_id
        of_config = store.start_rollout("a task", config=own)
        of_train, of_val, of_test = (
            store.start_rollout("a task", mode=mode, resources_id=of_resources) for mode in ("train", "val", "test")
        )
        expected = ids_of(of_val, warm)
        # The config's, and the resources' for the mode; in the path, and in the key. The client asks for another one.
        assert (
            ids_of(of_config, greedy) == ids_of(of_train, greedy) == ids_of(of_train, greedy, by_key=True) == expected
        )
        assert ids_of(of_val, greedy) != expected
        ids_of(of_test, greedy)

        rest = {"top_p": 0.9, **FROM_CONFIG}
        assert params_of(of_config) == params_of(of_train) == ({"temperature": 0.7, **rest}, {"temperature": 0.0})
        # Of a greedy request, vLLM itself forgets top_p.
        assert params_of(of_val) == ({"temperature": 0.0, **FROM_CONFIG}, None)
        assert params_of(of_test) == ({"temperature": 1.3, "top_k": 5, **rest}, {"temperature": 0.0, "top_k": 0})


def test_several_answers_to_a_greedy_request_are_drawn(pinned: RecordingServer) -> None:
    body = {"model": pinned.model, "prompt": "Paris?", "max_tokens": 12, "temperature": 0, "n": 2, "seed": 3}

    answers = post(pinned, "/v1/completions", body)["choices"]

    assert len(answers) == 2
    assert answers[0]["text"] != answers[1]["text"]
    with pytest.raises(HTTPError, match="400"):
        post(pinned, "/v1/completions", {**body, "temperature": 7})


def test_the_status_counts_calls_that_asked_for_something_else(pinned: RecordingServer) -> None:
    def differing() -> dict[str, int]:
        found = fetch(pinned, STATUS_ROUTE)["sampling"]
        assert (found["mode"], found["pins"]) == ("pin", PINNED)
        return found["differing"]

    before = differing()
    post(pinned, "/v1/completions", body_of(pinned, "/v1/completions", {**NEUTRAL, "top_k": 5}))

    assert {name: count - before.get(name, 0) for name, count in differing().items()} == {
        **dict.fromkeys(before, 0),
        "top_k": 1,
    }


def test_a_beam_search_is_left_alone(pinned: RecordingServer, recording: RecordingServer) -> None:
    body = {"prompt": "Paris?", "max_tokens": 8, "use_beam_search": True, "n": 2, "temperature": 0}

    texts = [
        [each["text"] for each in post(server, "/v1/completions", {"model": server.model, **body})["choices"]]
        for server in (pinned, recording)
    ]

    assert texts[0] == texts[1]


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_rollout_may_call_the_model_whatever_it_likes(pinned: RecordingServer, endpoint: str) -> None:
    body = {**body_of(pinned, endpoint, {}), "model": "claude-opus-9"}

    post(pinned, f"/rollout/named{endpoint}", body)

    found = pinned.recorded(rollout_id="named")[-1]
    assert (found.model, found.served_model) == ("claude-opus-9", pinned.model)
    with pytest.raises(HTTPError, match="404"):
        post(pinned, endpoint, body)


def test_a_model_that_is_there_keeps_its_name(pinned: RecordingServer) -> None:
    post(pinned, "/rollout/known/v1/completions", body_of(pinned, "/v1/completions", {}))

    [found] = pinned.recorded(rollout_id="known")
    assert (found.model, found.served_model) == (pinned.model, None)


def test_reporting_counts_and_changes_no_answer(nursery: Nursery, recording: RecordingServer, tmp_path: Path) -> None:
    env = {"AGL_SAMPLING": "report", "AGL_RETURN_TOKEN_IDS": "none"}
    with nursery.server(tmp_path / "generations.db", *ROUTES, env=env) as reporting:
        for endpoint in ENDPOINTS:
            # The other server answers a response twice, and no batch has seeds.
            if endpoint in ("/v1/responses", "/v1/chat/completions/batch"):
                continue
            for params in (NEUTRAL, OTHER, {"temperature": 0.8, "top_p": 0.9}):
                body = body_of(recording, endpoint, params)
                # The other server was told to tell more of the usage.
                answers = [steady(post(server, endpoint, body)) | {"usage": None} for server in (recording, reporting)]
                if endpoint != "/v1/messages" or params is OTHER:
                    assert answers[0] == answers[1]
        generations = reporting.recorded()
        counted = fetch(reporting, STATUS_ROUTE)["sampling"]

    assert [each.requested_params for each in generations] == [None] * len(generations)
    assert counted == {
        "mode": "report",
        "pins": "temperature=1,top_p=1,top_k=-1,min_p=0,repetition_penalty=1,presence_penalty=0,frequency_penalty=0",
        "differing": {"temperature": 8, "top_p": 8, "top_k": 4, "min_p": 3, "repetition_penalty": 3},
    }
