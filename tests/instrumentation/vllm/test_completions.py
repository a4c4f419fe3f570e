"""Token ids in the answers of /v1/completions of a real vLLM."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch

from tests.common.answers import Streamed, gather, post, steady, tokenize
from tests.common.reference import greedy, shows
from tests.common.vllm import RemoteOpenAIServer

COMPLETIONS = "/v1/completions"
PROMPTS = ["The quick brown", "Größe 😀", "one two"]


def ask(server: RemoteOpenAIServer, **options: Any) -> Any:
    """Ask for a plain answer, with the `openai` client."""
    options = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, **options}
    return server.client().completions.create(model=server.model, **options)


def ask_streamed(server: RemoteOpenAIServer, **options: Any) -> Streamed:
    """Ask for a streamed answer, and join its chunks."""
    return gather(ask(server, stream=True, stream_options={"include_usage": True}, **options))


def body(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, **options}


def embedded(tokens: int) -> str:
    """Return a prompt of that many random embeddings, as a client sends it."""
    buffer = io.BytesIO()
    torch.save(torch.rand(tokens, 64), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_answer_carries_the_ids_of_prompt_and_response(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed)
    [choice] = answer.choices

    assert choice.prompt_token_ids == tokenize(armed, prompt=PROMPTS[0])
    assert answer.response_token_ids == [choice.token_ids]
    assert choice.token_ids == greedy(choice.prompt_token_ids, 12)
    assert shows(choice.token_ids, choice.text)


def test_several_prompts_with_n_each_carry_their_own_ids(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed, prompt=PROMPTS, n=2, temperature=1)

    assert [choice.prompt_token_ids for choice in answer.choices] == [
        tokenize(armed, prompt=prompt) for prompt in PROMPTS for _ in range(2)
    ]
    assert answer.response_token_ids == [choice.token_ids for choice in answer.choices]
    assert all(shows(choice.token_ids, choice.text) for choice in answer.choices)


def test_prompts_given_as_ids_come_back_as_they_were(armed: RemoteOpenAIServer) -> None:
    prompts = [[77, 45, 205, 138], [8], [201, 201, 201]]
    answer, streamed = ask(armed, prompt=prompts), ask_streamed(armed, prompt=prompts)

    assert [choice.prompt_token_ids for choice in answer.choices] == prompts
    assert streamed.prompt_token_ids == dict(enumerate(prompts))
    assert answer.response_token_ids == [greedy(prompt, 12) for prompt in prompts]


def test_streamed_ids_joined_are_those_of_the_plain_answer(armed: RemoteOpenAIServer) -> None:
    streamed, answer = ask_streamed(armed, prompt=PROMPTS), ask(armed, prompt=PROMPTS)

    assert streamed.token_ids == dict(enumerate(answer.response_token_ids))
    assert streamed.prompt_token_ids == {choice.index: choice.prompt_token_ids for choice in answer.choices}
    assert streamed.text == {choice.index: choice.text for choice in answer.choices}


def test_beam_search_carries_ids(armed: RemoteOpenAIServer) -> None:
    answer = ask(armed, n=2, extra_body={"use_beam_search": True})

    assert all(shows(choice.token_ids, choice.text) for choice in answer.choices)
    assert answer.response_token_ids == [choice.token_ids for choice in answer.choices]
    assert answer.response_token_ids[0] != answer.response_token_ids[1]


class TestEcho:
    """vLLM drops the echoed prompt if it is asked for ids: a client that did not ask gets both prompt and ids."""

    @pytest.mark.parametrize("options", [{}, {"prompt": PROMPTS, "logprobs": 1}], ids=str)
    def test_a_plain_answer_keeps_the_echo_beside_the_ids(
        self, armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, options: dict[str, Any]
    ) -> None:
        ours = post(armed, COMPLETIONS, body(armed, echo=True, **options))
        vllms = post(plain, COMPLETIONS, body(plain, echo=True, **options))
        ids = post(plain, COMPLETIONS, body(plain, return_token_ids=True, **options))

        for choice, with_ids in zip(ours["choices"], ids["choices"], strict=True):
            assert choice.pop("prompt_token_ids") == with_ids["prompt_token_ids"]
            assert choice.pop("token_ids") == with_ids["token_ids"]
        for choice in vllms["choices"]:
            del choice["prompt_token_ids"], choice["token_ids"]
        assert ours.pop("response_token_ids") == [choice["token_ids"] for choice in ids["choices"]]
        assert steady(ours) == steady(vllms)

    def test_a_stream_keeps_the_echo_beside_the_ids(self, armed: RemoteOpenAIServer, plain: RemoteOpenAIServer) -> None:
        streamed, vllms = (ask_streamed(server, prompt=PROMPTS, echo=True) for server in (armed, plain))
        ids = ask_streamed(plain, prompt=PROMPTS, extra_body={"return_token_ids": True})

        assert streamed.text == vllms.text
        assert streamed.token_ids == ids.token_ids
        assert streamed.prompt_token_ids == ids.prompt_token_ids
        assert streamed.usage == vllms.usage

    def test_an_echo_request_that_asks_for_ids_gets_vllms_answer(
        self, armed: RemoteOpenAIServer, plain: RemoteOpenAIServer
    ) -> None:
        ours = post(armed, COMPLETIONS, body(armed, echo=True, return_token_ids=True))
        del ours["response_token_ids"]

        assert steady(ours) == steady(post(plain, COMPLETIONS, body(plain, echo=True, return_token_ids=True)))


class TestPromptEmbeds:
    """An embedded prompt has no ids: vLLM gives zeros, and no one may train on those."""

    def test_only_prompts_of_tokens_carry_prompt_ids(self, armed: RemoteOpenAIServer) -> None:
        embeds = [embedded(3), embedded(5)]
        answer = ask(armed, n=2, temperature=1, extra_body={"prompt_embeds": embeds})

        prompt = tokenize(armed, prompt=PROMPTS[0])
        assert [choice.prompt_token_ids for choice in answer.choices] == [None, None, None, None, prompt, prompt]
        assert [len(ids) for ids in answer.response_token_ids] == [len(c.token_ids) for c in answer.choices]
        assert all(answer.response_token_ids)

    def test_only_streams_of_token_prompts_carry_prompt_ids(self, armed: RemoteOpenAIServer) -> None:
        streamed = ask_streamed(armed, extra_body={"prompt_embeds": embedded(3)})

        assert streamed.prompt_token_ids == {1: tokenize(armed, prompt=PROMPTS[0])}
        assert [len(ids) for ids in streamed.token_ids.values()] == [12, 12]
