"""One question to every endpoint, plain and streamed, and the ids in the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.common.answers import post
from tests.common.reference import greedy, tokenizer
from tests.common.vllm import RemoteOpenAIServer

MESSAGES: Any = [{"role": "user", "content": "one two three"}]
TOKENS = 8

Ids = tuple[list[int], list[int]]


class Endpoint(NamedTuple):
    """An endpoint: how to ask it, and where its answers carry their ids."""

    route: str
    question: Callable[[], dict[str, Any]]
    plain: Callable[[Any], Ids]
    streamed: Callable[[Any], Ids]


def prompt_token_ids() -> list[int]:
    """Return the ids of the question."""
    return tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)


def expected() -> dict[str, Ids]:
    """Return the expected ids of each answer: prompt and response are the same at every endpoint."""
    prompt = prompt_token_ids()
    ways = [f"{name}{how}" for name in ENDPOINTS for how in ("", ", streamed")]
    return dict.fromkeys(ways, (prompt, greedy(prompt, TOKENS)))


def carried(server: RemoteOpenAIServer, below: str = "") -> dict[str, Ids]:
    """Return the ids in each answer: those of the prompt, and those of the response.

    Args:
        server: the one that is asked.
        below: what comes before each route.
    """
    answers = {}
    for name, endpoint in ENDPOINTS.items():
        route, body = below + endpoint.route, {"model": server.model, "temperature": 0, **endpoint.question()}
        answers[name] = endpoint.plain(post(server, route, body))
        answers[f"{name}, streamed"] = endpoint.streamed(post(server, route, {**body, "stream": True}))
    return answers


def _of_answer(answer: dict[str, Any]) -> Ids:
    [response] = answer["response_token_ids"]
    return answer["prompt_token_ids"], response


def _of_completion(answer: dict[str, Any]) -> Ids:
    [choice] = answer["choices"]
    return _of_answer({**answer, "prompt_token_ids": choice["prompt_token_ids"]})


def _of_chunks(chunks: list[dict[str, Any]]) -> Ids:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    [prompt] = [part["prompt_token_ids"] for part in (*chunks, *choices) if part.get("prompt_token_ids")]
    return prompt, [token_id for choice in choices for token_id in choice.get("token_ids") or []]


def _of_response_events(events: list[dict[str, Any]]) -> Ids:
    return _of_answer(events[-1]["response"])


def _of_message_events(events: list[dict[str, Any]]) -> Ids:
    [delta] = [event for event in events if event["type"] == "message_delta"]
    return _of_answer(delta)


def _conversation() -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": TOKENS}


ENDPOINTS = {
    "chat": Endpoint("/v1/chat/completions", _conversation, _of_answer, _of_chunks),
    "completions": Endpoint(
        "/v1/completions",
        lambda: {"prompt": prompt_token_ids(), "max_tokens": TOKENS},
        _of_completion,
        _of_chunks,
    ),
    "responses": Endpoint(
        "/v1/responses",
        lambda: {"input": MESSAGES, "max_output_tokens": TOKENS},
        _of_answer,
        _of_response_events,
    ),
    "messages": Endpoint("/v1/messages", _conversation, _of_answer, _of_message_events),
}
