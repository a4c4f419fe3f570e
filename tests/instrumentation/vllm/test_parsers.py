"""Token ids beside tool calls and reasoning, where a parser keeps text back, from a real vLLM.

The server runs with `AGL_RETURN_TOKEN_IDS=response`: no prompt ids unless a request asks for them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.common.answers import Streamed, gather, post, tokenize
from tests.common.vllm import RemoteOpenAIServer
from tests.instrumentation.vllm.test_responses import finished

MESSAGES: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}},
        },
    }
]
REASONED_CALL = (
    r"<think>a{20}</think>So:"
    r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Paris"\}\}\n</tool_call>'
)
ASKS: dict[str, dict[str, Any]] = {
    "reasoning": {"max_tokens": 40},
    "reasoning, text and a call": {"tools": TOOLS, "extra_body": {"structured_outputs": {"regex": REASONED_CALL}}},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "named": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    "several choices": {
        "tools": TOOLS,
        "n": 2,
        "temperature": 1,
        "seed": 1,
        "extra_body": {"structured_outputs": {"regex": REASONED_CALL}},
    },
}


def ask(server: RemoteOpenAIServer, **options: Any) -> Any:
    """Ask for a plain answer, with the `openai` client."""
    options = {"messages": MESSAGES, "max_tokens": 120, "temperature": 0, **options}
    return server.client().chat.completions.create(model=server.model, **options)


def ask_streamed(server: RemoteOpenAIServer, **options: Any) -> Streamed:
    """Ask for a streamed answer, and join its chunks."""
    return gather(ask(server, stream=True, stream_options={"include_usage": True}, **options))


@pytest.mark.parametrize("options", ASKS.values(), ids=ASKS.keys())
def test_no_id_is_lost_or_doubled_while_a_parser_is_silent(
    parsing: RemoteOpenAIServer, options: dict[str, Any]
) -> None:
    streamed = ask_streamed(parsing, **options)

    assert streamed.usage is not None
    assert sum(map(len, streamed.token_ids.values())) == streamed.usage["completion_tokens"]
    if options.get("n", 1) == 1:
        assert streamed.token_ids == dict(enumerate(ask(parsing, **options).response_token_ids))


def test_the_forced_answer_is_parsed_into_reasoning_text_and_a_call(parsing: RemoteOpenAIServer) -> None:
    streamed = ask_streamed(parsing, **ASKS["reasoning, text and a call"])

    assert streamed.reasoning[0].startswith("a" * 20)
    assert streamed.text[0] == "So:"
    assert streamed.tool_arguments[0] == '{"city": "Paris"}'


@pytest.mark.parametrize("asked", [None, True], ids=["not said", "asked for"])
def test_without_prompt_ids_unless_the_request_asks(parsing: RemoteOpenAIServer, asked: bool | None) -> None:
    options = {"extra_body": {"return_token_ids": asked}, "max_tokens": 8}
    expected = tokenize(parsing, messages=MESSAGES) if asked else None
    answer, streamed = ask(parsing, **options), ask_streamed(parsing, **options)

    assert answer.prompt_token_ids == expected
    assert streamed.prompt_token_ids.get(0) == expected
    assert streamed.token_ids == {0: answer.response_token_ids[0]}


@pytest.mark.parametrize("asked", [None, True], ids=["not said", "asked for"])
def test_completions_without_prompt_ids_unless_the_request_asks(
    parsing: RemoteOpenAIServer, asked: bool | None
) -> None:
    def complete(stream: bool) -> Any:
        return parsing.client().completions.create(
            model=parsing.model,
            prompt=["one", "two"],
            max_tokens=5,
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": asked},
        )

    expected = [tokenize(parsing, prompt=prompt) for prompt in ("one", "two")] if asked else [None, None]
    answer, streamed = complete(stream=False), gather(complete(stream=True))

    assert [choice.prompt_token_ids for choice in answer.choices] == expected
    assert [streamed.prompt_token_ids.get(index) for index in (0, 1)] == expected
    assert streamed.token_ids == dict(enumerate(answer.response_token_ids))


def test_ids_that_vllm_hides_on_purpose_stay_hidden(parsing: RemoteOpenAIServer) -> None:
    options = {**ASKS["reasoning, text and a call"]}
    options["extra_body"] = {**options["extra_body"], "include_reasoning": False}
    answer, streamed = ask(parsing, **options), ask_streamed(parsing, **options)

    assert answer.choices[0].message.tool_calls
    assert answer.choices[0].token_ids is None
    assert "response_token_ids" not in answer.model_extra
    assert streamed.token_ids == {0: []}


HIDDEN: dict[str, Any] = {"include_reasoning": False, "structured_outputs": {"regex": r"<think>a{20}</think>So: b"}}
SAID: Any = pytest.mark.parametrize("said", [{}, {"return_token_ids": True}], ids=["not said", "asked for"])


def told(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "temperature": 0, **HIDDEN, **options}


def hides(answer: Any) -> bool:
    """Tell whether an answer has neither reasoning nor any generated id or logprob."""
    written = json.dumps(answer)
    return not any(name in written for name in ("<think>", "aaaa", "response_token_ids", '"token_ids": [', '"logprob"'))


@SAID
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_response_without_its_reasoning_has_no_response_ids(
    parsing: RemoteOpenAIServer, said: dict[str, bool], stream: bool
) -> None:
    body = told(parsing, input="How?", max_output_tokens=60, stream=stream, **said)
    body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = post(parsing, "/v1/responses", body)
    closing = answer[-1]["response"] if stream else answer

    assert hides(answer)
    # Of its stream vLLM 0.32 leaves out the text too.
    assert stream or "So: b" in json.dumps(answer)
    # AGL_RETURN_TOKEN_IDS=response
    assert ("prompt_token_ids" in closing) == bool(said)
    assert closing["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@SAID
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_background_response_without_its_reasoning_has_no_response_ids(
    parsing: RemoteOpenAIServer, said: dict[str, bool], stream: bool
) -> None:
    body = told(parsing, input="How?", max_output_tokens=60, background=True, store=True, stream=stream, **said)
    answer = post(parsing, "/v1/responses", body)
    queued = answer[0]["response"] if stream else answer

    fetched = finished(parsing, queued["id"]).model_dump(mode="json")
    assert hides(answer)
    assert hides(fetched)
    assert fetched["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@SAID
def test_a_batch_without_its_reasoning_has_no_response_ids(parsing: RemoteOpenAIServer, said: dict[str, bool]) -> None:
    body = told(parsing, messages=[MESSAGES] * 2, max_tokens=60, logprobs=True, **said)
    answer = post(parsing, "/v1/chat/completions/batch", body)

    assert hides(answer)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["So: b"] * 2
    assert [bool(choice.get("prompt_token_ids")) for choice in answer["choices"]] == [bool(said)] * 2


def test_a_batch_that_declines_ids_gets_vllms_own_answer(parsing: RemoteOpenAIServer) -> None:
    body = told(parsing, messages=[MESSAGES], max_tokens=60, logprobs=True, return_token_ids=False)

    assert post(parsing, "/v1/chat/completions/batch", body)["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions/batch"])
def test_a_server_without_a_parser_hides_nothing(armed: RemoteOpenAIServer, path: str) -> None:
    asked = {"input": "How?"} if path == "/v1/responses" else {"messages": [MESSAGES], "max_tokens": 60}
    answer = post(armed, path, told(armed, **asked))

    assert "<think>" in json.dumps(answer)
    assert answer["response_token_ids"]
