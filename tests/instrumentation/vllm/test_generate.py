"""Token ids in the answers of /inference/v1/generate, which takes and gives ids."""

from __future__ import annotations

from typing import Any

from tests.common.answers import post, steady
from tests.common.reference import greedy
from tests.common.vllm import RemoteOpenAIServer

GENERATE = "/inference/v1/generate"
PROMPT = [1, 87, 85, 275, 201]


def body(**options: Any) -> dict[str, Any]:
    return {"token_ids": PROMPT, "sampling_params": {"max_tokens": 6, "temperature": 0}, **options}


def test_an_answer_carries_prompt_ids_beside_vllms_response_ids(armed: RemoteOpenAIServer) -> None:
    answer = post(armed, GENERATE, body())

    assert answer["prompt_token_ids"] == PROMPT
    assert answer["choices"][0]["token_ids"] == greedy(PROMPT, 6)


def test_a_stream_carries_prompt_ids_on_its_first_chunk(armed: RemoteOpenAIServer) -> None:
    first, *others = post(armed, GENERATE, body(stream=True))

    assert first["prompt_token_ids"] == PROMPT
    assert not any(chunk.get("prompt_token_ids") for chunk in others)
    choices = [choice for chunk in (first, *others) for choice in chunk["choices"]]
    assert [token for choice in choices for token in choice["token_ids"] or []] == greedy(PROMPT, 6)


def test_a_request_that_declines_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer
) -> None:
    ours = post(armed, GENERATE, body(return_token_ids=False))

    assert steady(ours) == steady(post(plain, GENERATE, body()))
