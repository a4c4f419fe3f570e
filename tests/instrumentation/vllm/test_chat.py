"""Token ids in the answers of /v1/chat/completions of a real vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError

from tests.common.answers import Streamed, gather, post, tokenize
from tests.common.reference import greedy, shows
from tests.common.vllm import RemoteOpenAIServer
from tests.instrumentation.vllm.test_completions import embedded

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France? 😀"}]
CHAT = "/v1/chat/completions"


def ask(server: RemoteOpenAIServer, **options: Any) -> Any:
    """Ask for a plain answer, with the `openai` client."""
    options = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, **options}
    return server.client().chat.completions.create(model=server.model, **options)


def ask_streamed(server: RemoteOpenAIServer, **options: Any) -> Streamed:
    """Ask for a streamed answer, and join its chunks."""
    return gather(ask(server, stream=True, stream_options={"include_usage": True}, **options))


def body(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **options}


def test_an_answer_carries_the_ids_of_prompt_and_response(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)

    assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
    assert answer.response_token_ids == [answer.choices[0].token_ids]
    assert len(answer.response_token_ids[0]) == answer.usage.completion_tokens == 24
    assert shows(answer.response_token_ids[0], answer.choices[0].message.content)


def test_greedy_ids_are_those_of_transformers_on_the_same_prompt_ids(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)

    assert answer.response_token_ids[0] == greedy(answer.prompt_token_ids, 24)


def test_streamed_ids_joined_are_those_of_the_plain_answer(armed: RemoteOpenAIServer) -> None:
    streamed, answer = ask_streamed(armed), ask(armed)

    assert streamed.token_ids == {0: answer.response_token_ids[0]}
    assert streamed.prompt_token_ids == {0: answer.prompt_token_ids}
    assert streamed.text[0] == answer.choices[0].message.content


def test_a_stream_carries_prompt_ids_on_its_first_chunk(armed: RemoteOpenAIServer) -> None:
    first, *others = ask_streamed(armed).chunks

    assert first["prompt_token_ids"] == tokenize(armed, messages=MESSAGES)
    assert not any(chunk.get("prompt_token_ids") for chunk in others)


def test_with_n_every_choice_has_its_ids_in_index_order(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed, n=3, temperature=1)

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.response_token_ids == [choice.token_ids for choice in answer.choices]
    assert all(shows(choice.token_ids, choice.message.content) for choice in answer.choices)
    assert sum(map(len, answer.response_token_ids)) == answer.usage.completion_tokens


def test_with_n_a_stream_carries_every_choices_ids(armed: RemoteOpenAIServer) -> None:
    streamed = ask_streamed(armed, n=3, temperature=1)

    assert sorted(streamed.token_ids) == [0, 1, 2]
    assert all(shows(ids, streamed.text[index]) for index, ids in streamed.token_ids.items())
    assert streamed.usage is not None
    assert sum(map(len, streamed.token_ids.values())) == streamed.usage["completion_tokens"]


def test_beam_search_carries_ids(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed, n=2, extra_body={"use_beam_search": True})

    assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
    assert all(map(shows, answer.response_token_ids, [choice.message.content for choice in answer.choices]))
    assert answer.response_token_ids[0] != answer.response_token_ids[1]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_logprobs_are_vllms_own(armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, stream: bool) -> None:
    options = {"logprobs": True, "top_logprobs": 2, "stream": stream, "return_token_ids": True}

    def logprobs(server: RemoteOpenAIServer, options: dict[str, Any]) -> list[Any]:
        answer = post(server, CHAT, body(server, **options))
        choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk["choices"]]
        return [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]

    options_unsaid = {name: value for name, value in options.items() if name != "return_token_ids"}
    assert logprobs(armed, options_unsaid) == logprobs(plain, options)
    assert len(logprobs(armed, options_unsaid)) == 24


def test_a_refused_request_is_refused_as_before(armed: RemoteOpenAIServer, plain: RemoteOpenAIServer) -> None:
    messages = []
    for server in (armed, plain):
        with pytest.raises(BadRequestError) as refusal:
            ask(server, max_tokens=100_000)
        messages.append(refusal.value.body)
    assert messages[0] == messages[1]


def test_without_ids_the_field_is_absent_and_not_null(armed: RemoteOpenAIServer) -> None:
    assert "response_token_ids" not in post(armed, CHAT, body(armed, return_token_ids=False))


class TestPromptEmbeds:
    """vLLM gives placeholders as the ids of embeddings in a prompt: no one may train on those."""

    @pytest.fixture
    def messages(self) -> Any:
        parts = [{"type": "text", "text": "Say: "}, {"type": "prompt_embeds", "data": embedded(3)}]
        return [{"role": "user", "content": parts}]

    def test_an_answer_carries_no_prompt_ids(self, armed: RemoteOpenAIServer, messages: Any) -> None:
        answer = ask(armed, messages=messages)

        assert answer.prompt_token_ids is None
        assert answer.response_token_ids == [answer.choices[0].token_ids]
        assert len(answer.response_token_ids[0]) == 24

    def test_a_stream_carries_no_prompt_ids(self, armed: RemoteOpenAIServer, messages: Any) -> None:
        streamed, answer = ask_streamed(armed, messages=messages), ask(armed, messages=messages)

        assert streamed.prompt_token_ids == {}
        assert streamed.token_ids == {0: answer.response_token_ids[0]}
