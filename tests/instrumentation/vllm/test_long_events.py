"""Streams with so many ids that one event would be too long for a client that reads line by line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from itertools import chain
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.sse import LIMIT, split_ids, split_long_events
from tests.common.answers import post, tokenize
from tests.common.vllm import LITTLE_CACHE, NO_WORKER, RemoteOpenAIServer

MANY = [*range(100_000, 130_000)]
"""Ids of a long prompt in a large vocabulary: 210 kB of JSON."""


def event_of(**chunk: Any) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def sent(*events: str) -> list[str]:
    """Pass these events through `split`, and return what comes out."""

    async def stream() -> AsyncGenerator[str, None]:
        for event in events:
            yield event

    async def gathered() -> list[str]:
        return [event async for event in split_long_events(stream(), "/v1/made-up")]

    return asyncio.run(gathered())


def chunks_of(events: list[str]) -> list[dict[str, Any]]:
    assert all(len(event.encode()) <= LIMIT for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def chat_choice(index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def text_choice(finish_reason: str | None = None, **ids: list[int]) -> dict[str, Any]:
    return {"index": 1, "text": "one", "logprobs": None, "finish_reason": finish_reason, "stop_reason": None, **ids}


LIKE = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}


def test_ids_of_a_chat_prompt_follow_the_event_with_the_role() -> None:
    first = {**LIKE, "choices": [chat_choice(index=1, role="assistant", content="")]}
    others = [event_of(**LIKE, choices=[chat_choice(content="x")]), "data: [DONE]\n\n"]
    *events, second, done = sent(event_of(**first, prompt_token_ids=MANY), *others)

    assert [second, done] == others
    role, *more = chunks_of(events)
    assert role == {**first, "prompt_token_ids": None}
    assert [*chain(*(chunk.pop("prompt_token_ids") for chunk in more))] == MANY
    assert more == [{**LIKE, "choices": [chat_choice(index=1)]}] * len(more)


@pytest.mark.parametrize("finish_reason", [None, "length"])
def test_ids_of_a_completions_choice_come_before_its_end(finish_reason: str | None) -> None:
    """vLLM merges chunks that a slow client has not read yet: the merged chunk has too many ids as well."""
    choice = text_choice(finish_reason, prompt_token_ids=MANY, token_ids=MANY[::-1])
    chunks = chunks_of(sent(event_of(**LIKE, choices=[choice])))

    choices = [chunk["choices"][0] for chunk in chunks]
    assert [*chain(*(each["prompt_token_ids"] or [] for each in choices))] == MANY
    assert [*chain(*(each["token_ids"] for each in choices))] == MANY[::-1]
    where = -1 if finish_reason else 0
    assert choices.pop(where) == text_choice(finish_reason, prompt_token_ids=None, token_ids=[])  # type: ignore[arg-type]
    assert {(each["index"], each["text"], each["finish_reason"]) for each in choices} == {(1, "", None)}


def test_ids_that_fit_stay_where_they_are() -> None:
    choice = text_choice(prompt_token_ids=MANY, token_ids=[1, 2, 3])
    first, *_ = chunks_of(sent(event_of(**LIKE, choices=[choice])))

    assert first["choices"][0]["token_ids"] == [1, 2, 3]


@pytest.mark.parametrize(
    "event",
    [
        event_of(**LIKE, choices=[chat_choice(content="x" * LIMIT)]),
        event_of(**LIKE, choices=[chat_choice(content="x")], prompt_token_ids=MANY[:9_000]),
        event_of(**LIKE, choices=[{**chat_choice(content="€" * 20_000), "token_ids": [1]}]),
        f'data: no JSON, "prompt_token_ids":[{"1," * LIMIT}\n\n',
    ],
    ids=["long without ids", "short enough", "short enough, of long characters", "no JSON"],
)
def test_other_events_stay_unchanged(event: str) -> None:
    assert sent(event) == [event]


def test_the_limit_counts_bytes_not_characters() -> None:
    """Readers count 64 KiB in bytes."""
    events = sent(event_of(**LIKE, choices=[chat_choice(content="€" * 15_000)], prompt_token_ids=MANY[:4_000]))

    first, second = chunks_of(events)
    assert first["choices"][0]["delta"]["content"] == "€" * 15_000
    assert second["prompt_token_ids"] == MANY[:4_000]


def test_closing_the_stream_closes_vllms_stream() -> None:
    closed = []

    async def stream() -> AsyncGenerator[str, None]:
        try:
            yield event_of(**LIKE, choices=[chat_choice(content="x")], prompt_token_ids=MANY)
        finally:
            closed.append(True)

    async def leave() -> None:
        events = split_long_events(stream(), "/v1/made-up")
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    assert closed == [True]


def test_parts_joined_by_position_have_all_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "IDS_PER_EVENT", 3)
    generations = [{"prompt_token_ids": [1, 2], "token_ids": [3, 4]}, {"prompt_token_ids": [], "token_ids": [5]}]

    assert [*split_ids({"generations": generations, "response_token_ids": [[6], [7, 8]]})] == [
        {"generations": [{"prompt_token_ids": [1, 2], "token_ids": [3]}, {}]},
        {"generations": [{"token_ids": [4]}, {"token_ids": [5]}], "response_token_ids": [[6], []]},
        {"response_token_ids": [[], [7, 8]]},
    ]


# A real server, and a prompt as long as that of an agent that has read a repository. The tiny model's ids have
# three digits.
WORDS = 30_000
LONG = " one" * WORDS
SMALL = ("--max-model-len=40960", '--hf-overrides={"max_position_embeddings": 40960}', "--dtype=float32")
TALK: Any = [{"role": "user", "content": LONG}]


@pytest.fixture(scope="module")
def roomy() -> Iterator[RemoteOpenAIServer]:
    small = (*SMALL, "--enforce-eager", *LITTLE_CACHE, *NO_WORKER)
    env = {"AGL_INSTRUMENT": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with RemoteOpenAIServer("--enable-scale-out", env=env, small=small, forks=True) as server:
        yield server


CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GENERATE = "/inference/v1/generate"


def body(server: RemoteOpenAIServer, path: str, **options: Any) -> dict[str, Any]:
    asked: dict[str, dict[str, Any]] = {
        CHAT: {"messages": TALK, "max_tokens": 4},
        COMPLETIONS: {"prompt": LONG, "max_tokens": 1},
        RESPONSES: {"input": LONG, "max_output_tokens": 4},
        MESSAGES: {"messages": TALK, "max_tokens": 4},
        GENERATE: {"token_ids": [5] * WORDS, "sampling_params": {"max_tokens": 2, "temperature": 0}},
    }
    return {"model": server.model, "temperature": 0, "stream": True, **asked[path], **options}


def lines_of(server: RemoteOpenAIServer, path: str, **options: Any) -> list[str]:
    """Yield the lines of a stream, by a client that refuses lines over 64 KiB, as aiohttp did until 3.13."""

    async def read() -> list[str]:
        async with (
            aiohttp.ClientSession(read_bufsize=LIMIT // 2) as session,
            session.post(f"{server.url}{path}", json=body(server, path, **options)) as response,
        ):
            return [line.decode().rstrip() async for line in response.content]

    return asyncio.run(read())


def events_of(lines: list[str]) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def joined_ids(events: list[dict[str, Any]], name: str) -> list[int]:
    """Return the ids of this name on a stream, joined."""
    ids: list[int] = []
    for event in events:
        answer = event.get("response") or event
        for holder in (answer, *answer.get("choices", ())):
            for each in holder.get(name) or ():
                ids += each if isinstance(each, list) else [each]
    return ids


def prompt_of(server: RemoteOpenAIServer, path: str) -> list[int]:
    if path == GENERATE:
        return [5] * WORDS
    return tokenize(server, **({"prompt": LONG} if path == COMPLETIONS else {"messages": TALK}))


@pytest.mark.tier("all")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, GENERATE])
def test_a_client_that_reads_line_by_line_gets_every_line(roomy: RemoteOpenAIServer, path: str) -> None:
    events = events_of(lines_of(roomy, path))

    assert joined_ids(events, "prompt_token_ids") == prompt_of(roomy, path)
    name = "token_ids" if path in (CHAT, COMPLETIONS, GENERATE) else "response_token_ids"
    ids = joined_ids(events, name)
    assert ids == joined_ids(post_stream(roomy, path, return_token_ids=True), name) != []


def post_stream(server: RemoteOpenAIServer, path: str, **options: Any) -> list[dict[str, Any]]:
    return post(server, path, body(server, path, **options))


@pytest.mark.tier("all")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, GENERATE])
def test_a_request_for_ids_gets_them_in_one_event(roomy: RemoteOpenAIServer, path: str) -> None:
    with_ids = [
        event for event in post_stream(roomy, path, return_token_ids=True) if joined_ids([event], "prompt_token_ids")
    ]

    assert len(with_ids) == 1
    assert joined_ids(with_ids, "prompt_token_ids") == prompt_of(roomy, path)


@pytest.mark.tier("all")
def test_the_openai_client_reads_split_events(roomy: RemoteOpenAIServer) -> None:
    client = roomy.client()
    options: Any = {"model": roomy.model, "temperature": 0, "stream": True}
    chat = [*client.chat.completions.create(messages=TALK, max_tokens=4, **options)]
    completion = [*client.completions.create(prompt=LONG, max_tokens=4, **options)]
    responses = [*client.responses.create(input=LONG, max_output_tokens=4, **options)]

    for chunks, path in ((chat, CHAT), (completion, COMPLETIONS), (responses, RESPONSES)):
        events = [chunk.model_dump() for chunk in chunks]
        assert joined_ids(events, "prompt_token_ids") == prompt_of(roomy, path)
    assert all(chunk.choices for chunk in (*chat, *completion)), "each chunk has a choice, as in vLLM's own stream"
    assert [event.sequence_number for event in responses] == [*range(len(responses))]
    assert responses[-1].type == "response.completed"
    with client.responses.stream(model=roomy.model, input=LONG, max_output_tokens=4, temperature=0) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == responses[-1].response.output_text


@pytest.mark.tier("all")
def test_the_anthropic_client_reads_split_events(roomy: RemoteOpenAIServer) -> None:
    client = anthropic.Anthropic(base_url=roomy.url, api_key="none", max_retries=0, timeout=120)
    with client.messages.stream(model=roomy.model, messages=TALK, max_tokens=4) as stream:
        events = [event.model_dump() for event in stream if event.type == "message_delta"]
        message = stream.get_final_message()

    assert joined_ids(events, "prompt_token_ids") == prompt_of(roomy, MESSAGES)
    assert len(events) > 1
    assert message.stop_reason == events[-1]["delta"]["stop_reason"] == "max_tokens"
    assert message.usage.output_tokens == 4


@pytest.mark.tier("all")
def test_a_fetched_response_has_all_ids(roomy: RemoteOpenAIServer) -> None:
    events = post_stream(roomy, RESPONSES, background=True, store=True)
    client: openai.OpenAI = roomy.client()
    fetched: Any = client.responses.retrieve(events[0]["response"]["id"])
    again = [event.model_dump() for event in client.responses.retrieve(fetched.id, stream=True)]

    assert fetched.prompt_token_ids == prompt_of(roomy, RESPONSES)
    assert fetched.response_token_ids == [joined_ids(events, "response_token_ids")]
    assert joined_ids(events, "prompt_token_ids") == joined_ids(again, "prompt_token_ids") == fetched.prompt_token_ids
