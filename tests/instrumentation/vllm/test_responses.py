"""Token ids in the answers of /v1/responses of a real vLLM."""

from __future__ import annotations

import time
import urllib.request
from typing import Any

import pytest

from tests.common.answers import fetch, joined_events, post, steady, tokenize
from tests.common.reference import greedy, shows
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.server import RecordingServer

RESPONSES = "/v1/responses"
INPUT = "What is the capital of France? 😀"
MESSAGES = [{"role": "user", "content": INPUT}]
TOOL = {
    "type": "function",
    "name": "look_up",
    "description": "looks a word up",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
DEADLINE = 60


def body(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "input": INPUT, "max_output_tokens": 24, "temperature": 0, **options}


def ask(server: RemoteOpenAIServer, **options: Any) -> Any:
    """Ask for a plain answer, with the `openai` client."""
    return server.client().responses.create(**body(server, **options))


def finished(server: RemoteOpenAIServer, response_id: str) -> Any:
    """Return the stored response, once it is finished."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        response = server.client().responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        time.sleep(0.1)
    raise TimeoutError(response_id)


def carries(event: dict[str, Any]) -> bool:
    return "token_ids" in str(event)


def test_an_answer_carries_the_ids_of_prompt_and_response(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)

    assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
    assert answer.response_token_ids == [greedy(answer.prompt_token_ids, 24)]
    assert len(answer.response_token_ids[0]) == answer.usage.output_tokens
    assert shows(answer.response_token_ids[0], answer.output_text)
    assert not hasattr(answer, "generations")


def test_an_incomplete_answer_carries_what_was_generated(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed, max_output_tokens=3)

    assert answer.status == "incomplete"
    assert answer.response_token_ids == [greedy(answer.prompt_token_ids, 3)]


def test_a_stream_carries_ids_on_its_closing_event(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)
    *others, last = [event.model_dump() for event in ask(armed, stream=True)]

    # vLLM's words: from 0.33 on the latter, where an answer was cut short.
    assert last["type"] in ("response.completed", "response.incomplete")
    assert last["response"]["prompt_token_ids"] == answer.prompt_token_ids
    assert last["response"]["response_token_ids"] == answer.response_token_ids
    assert not any(map(carries, others))


def test_a_fetched_background_response_carries_ids(armed: RemoteOpenAIServer) -> None:
    queued = ask(armed, background=True, store=True)
    answer = finished(armed, queued.id)

    assert not hasattr(queued, "response_token_ids")
    assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
    assert answer.response_token_ids == [greedy(answer.prompt_token_ids, 24)]


def test_a_background_stream_carries_ids(armed: RemoteOpenAIServer) -> None:
    events = post(armed, RESPONSES, body(armed, background=True, store=True, stream=True))

    assert events[-1]["response"]["response_token_ids"] == [greedy(events[-1]["response"]["prompt_token_ids"], 24)]
    fetched = fetch(armed, f"{RESPONSES}/{events[0]['response']['id']}?stream=true")
    assert fetched == events


def test_the_next_turn_has_its_own_ids(armed: RemoteOpenAIServer) -> None:
    first = ask(armed, store=True, max_output_tokens=4)
    second = ask(armed, previous_response_id=first.id, max_output_tokens=4)

    assert len(second.prompt_token_ids) > len(first.prompt_token_ids)
    assert second.response_token_ids == [greedy(second.prompt_token_ids, 4)]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_request_that_declines_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, stream: bool
) -> None:
    ours = post(armed, RESPONSES, body(armed, stream=stream, return_token_ids=False))
    vllms = post(plain, RESPONSES, body(plain, stream=stream))

    assert steady(joined_events(ours)) == steady(joined_events(vllms))
    assert not carries(ours)


def test_an_answer_differs_from_vllms_only_by_its_ids(armed: RemoteOpenAIServer, plain: RemoteOpenAIServer) -> None:
    ours = post(armed, RESPONSES, body(armed))
    del ours["prompt_token_ids"], ours["response_token_ids"]

    assert steady(ours) == steady(post(plain, RESPONSES, body(plain)))


@pytest.mark.parametrize("nonsense", ["yes", 1, None, [], {}], ids=repr)
def test_a_value_that_is_not_boolean_counts_as_omitted(armed: RemoteOpenAIServer, nonsense: Any) -> None:
    assert post(armed, RESPONSES, body(armed, return_token_ids=nonsense))["response_token_ids"]


def test_the_switch_leaves_prompt_ids_out(parsing: RemoteOpenAIServer) -> None:
    answer = ask(parsing)

    assert len(answer.response_token_ids[0]) == answer.usage.output_tokens
    assert not hasattr(answer, "prompt_token_ids")
    assert post(parsing, RESPONSES, body(parsing, return_token_ids=True))["prompt_token_ids"]


@pytest.mark.parametrize("tokens", [200, 3], ids=["whole", "cut off, so that it cannot be parsed"])
def test_a_tool_call_carries_its_ids(parsing: RemoteOpenAIServer, tokens: int) -> None:
    answer = ask(parsing, tools=[TOOL], tool_choice="required", max_output_tokens=tokens)

    assert len(answer.response_token_ids) == 1
    assert len(answer.response_token_ids[0]) == answer.usage.output_tokens


def test_a_refused_request_is_refused_as_before(armed: RemoteOpenAIServer, plain: RemoteOpenAIServer) -> None:
    refused = []
    for server in (armed, plain):
        with pytest.raises(urllib.request.HTTPError) as refusal:
            post(server, RESPONSES, body(server, max_output_tokens=100_000))
        refused.append((refusal.value.code, refusal.value.read()))
    assert refused[0] == refused[1]


def test_a_response_with_a_tool_call_lists_every_generation(recording: RecordingServer) -> None:
    # AGL_RETURN_TOKEN_IDS=none, and each response takes two calls of the model.
    answer = post(recording, RESPONSES, body(recording, return_token_ids=True))
    streamed = post(recording, RESPONSES, body(recording, stream=True, return_token_ids=True))[-1]["response"]
    response_only = post(recording, RESPONSES, body(recording, return_token_ids=False))

    # The made-up tool says nothing, so the model is asked the same thing twice.
    generation = {"prompt_token_ids": answer["prompt_token_ids"], "token_ids": greedy(answer["prompt_token_ids"], 24)}
    assert answer["generations"] == [generation, generation]
    assert answer["response_token_ids"] == [generation["token_ids"]]
    assert streamed["generations"] == answer["generations"]
    assert not carries(response_only)
    assert "generations" not in response_only
