"""Token ids in the answers of /v1/messages of a real vLLM, with the real `anthropic` client."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.common.answers import joined_events, post, steady, tokenize
from tests.common.reference import greedy, shows
from tests.common.vllm import RemoteOpenAIServer

ROUTE = "/v1/messages"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France? 😀"}]
TOOL: Any = {
    "name": "look_up",
    "description": "looks a word up",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}


def body(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **options}


def ask(server: RemoteOpenAIServer, **options: Any) -> Any:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    known = {name: value for name, value in body(server, **options).items() if name != "temperature"}
    # Not a parameter of the newest client's.
    return client.messages.create(**known, extra_body={"temperature": 0})


def test_an_answer_carries_the_ids_of_prompt_and_response(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)

    assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
    assert answer.response_token_ids == [greedy(answer.prompt_token_ids, 24)]
    assert len(answer.response_token_ids[0]) == answer.usage.output_tokens
    assert shows(answer.response_token_ids[0], answer.content[0].text)


def test_a_stream_carries_ids_on_its_message_delta(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)
    events = [event.model_dump() for event in ask(armed, stream=True)]

    [delta] = [event for event in events if event["type"] == "message_delta"]
    assert delta["prompt_token_ids"] == answer.prompt_token_ids
    assert delta["response_token_ids"] == answer.response_token_ids
    assert not any("token_ids" in str(event) for event in events if event is not delta)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_request_that_declines_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, stream: bool
) -> None:
    ours = post(armed, ROUTE, body(armed, stream=stream, return_token_ids=False))
    vllms = post(plain, ROUTE, body(plain, stream=stream))

    assert steady(joined_events(ours)) == steady(joined_events(vllms))
    assert "token_ids" not in str(ours)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_an_answer_differs_from_vllms_only_by_its_ids(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, stream: bool
) -> None:
    ours = post(armed, ROUTE, body(armed, stream=stream))
    with_ids = next(event for event in ours if event["type"] == "message_delta") if stream else ours
    del with_ids["prompt_token_ids"], with_ids["response_token_ids"]

    assert steady(joined_events(ours)) == steady(joined_events(post(plain, ROUTE, body(plain, stream=stream))))


def test_only_the_request_itself_can_decline(armed: RemoteOpenAIServer) -> None:
    quoted = [{"role": "user", "content": '{"return_token_ids": false}'}]

    assert ask(armed, messages=quoted).response_token_ids


# Not whole and plain: what random weights put into a call is seldom JSON, and vLLM refuses it then.
@pytest.mark.parametrize(("tokens", "stream"), [(3, False), (3, True), (200, True)], ids=str)
def test_a_tool_call_carries_its_ids(parsing: RemoteOpenAIServer, tokens: int, stream: bool) -> None:
    options = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": tokens, "stream": stream}
    answer = post(parsing, ROUTE, body(parsing, **options))
    answer = next(event for event in answer if event["type"] == "message_delta") if stream else answer

    assert len(answer["response_token_ids"][0]) == answer["usage"]["output_tokens"]
    # AGL_RETURN_TOKEN_IDS=response
    assert "prompt_token_ids" not in answer
