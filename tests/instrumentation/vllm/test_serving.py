"""The server: ways to start it, several processes, many clients, clients that hang up."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import openai

from tests.common.answers import gather, joined, post, steady
from tests.common.reference import tokenizer
from tests.common.vllm import RemoteOpenAIServer, processes_that_serve

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "one two three"}]


def chat(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **options}


def test_agl_vllm_serve_answers_as_the_variable_does(
    armed: RemoteOpenAIServer, two_api_servers: RemoteOpenAIServer
) -> None:
    completion = {"model": armed.model, "prompt": "one", "temperature": 0}
    for path, asked in ((CHAT, chat(armed)), ("/v1/completions", completion)):
        ours, expected = (steady(post(server, path, asked)) for server in (two_api_servers, armed))
        assert ours == expected
        assert ours["response_token_ids"]

        ours, expected = (
            joined(steady(post(server, path, {**asked, "stream": True}))) for server in (two_api_servers, armed)
        )
        assert ours == expected
        assert ours["choices"][0]["token_ids"]


def test_every_api_server_process_attaches_ids(two_api_servers: RemoteOpenAIServer) -> None:
    clients = [two_api_servers.client() for _ in range(32)]

    def ask(client: openai.OpenAI) -> Any:
        return client.chat.completions.create(model=two_api_servers.model, messages=MESSAGES, max_tokens=16)

    with ThreadPoolExecutor(len(clients)) as threads:
        answers = list(threads.map(ask, clients))

    assert all(answer.model_extra["response_token_ids"] for answer in answers)
    assert len(processes_that_serve(two_api_servers)) == 2


def test_vllm_without_the_variable_is_unchanged(plain: RemoteOpenAIServer) -> None:
    answer = post(plain, CHAT, chat(plain))

    assert answer["prompt_token_ids"] is None
    assert answer["choices"][0]["token_ids"] is None
    assert "response_token_ids" not in answer
    assert "agentlightning" not in plain.log


def test_sixty_four_concurrent_requests_never_mix(armed: RemoteOpenAIServer) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        messages: Any = [{"role": "user", "content": f"Number {number}?"}]
        text = f"It is number {number}."
        options: dict[str, Any] = {
            "model": armed.model,
            "messages": messages,
            "max_tokens": 40,
            "extra_body": {"structured_outputs": {"choice": [text]}},
        }
        if number % 2:
            chunks = await client.chat.completions.create(stream=True, **options)
            streamed = gather([chunk async for chunk in chunks])
            prompt, response = streamed.prompt_token_ids[0], streamed.token_ids[0]
        else:
            answer = await client.chat.completions.create(**options)
            prompt, response = answer.prompt_token_ids, answer.response_token_ids[0]
        expected = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer().decode(prompt) == expected
        assert tokenizer().decode(response, skip_special_tokens=True) == text

    async def ask_all() -> None:
        async with armed.async_client() as client:
            await asyncio.gather(*(ask(client, number) for number in range(64)))

    asyncio.run(ask_all())


Spoken = list[tuple[list[int], list[int], str]]
"""Prompt ids, response ids and text, for each prompt of a request."""


def question(number: int) -> str:
    return f"Number {number}?"


def conversation(number: int) -> Any:
    return [{"role": "user", "content": question(number)}]


def of_choices(answer: Any) -> Spoken:
    return [
        (
            choice.get("prompt_token_ids") or answer["prompt_token_ids"],
            choice["token_ids"],
            choice["message"]["content"],
        )
        for choice in answer["choices"]
    ]


def of_completion(answer: Any) -> Spoken:
    (choice,) = answer["choices"]
    return [(choice["prompt_token_ids"], choice["token_ids"], choice["text"])]


def of_response(answer: Any) -> Spoken:
    response = answer[-1]["response"] if isinstance(answer, list) else answer
    texts = (part["text"] for item in response["output"] for part in item["content"])
    return [(response["prompt_token_ids"], response["response_token_ids"][0], "".join(texts))]


def of_message(answer: Any) -> Spoken:
    texts = (part["text"] for part in answer["content"])
    return [(answer["prompt_token_ids"], answer["response_token_ids"][0], "".join(texts))]


def of_message_stream(events: Any) -> Spoken:
    (end,) = (event for event in events if event["type"] == "message_delta")
    texts = (event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    return [(end["prompt_token_ids"], end["response_token_ids"][0], "".join(texts))]


EVERY_ENDPOINT: list[tuple[str, Callable[[int], dict[str, Any]], Callable[[Any], Spoken]]] = [
    (CHAT, lambda number: {"messages": conversation(number), "max_tokens": 16}, of_choices),
    (
        "/v1/chat/completions/batch",
        lambda number: {"messages": [conversation(number), conversation(number)], "max_tokens": 16},
        of_choices,
    ),
    ("/v1/completions", lambda number: {"prompt": question(number), "max_tokens": 16}, of_completion),
    ("/v1/completions", lambda number: {"prompt": question(number), "echo": True, "max_tokens": 16}, of_completion),
    ("/v1/responses", lambda number: {"input": question(number), "max_output_tokens": 16}, of_response),
    ("/v1/responses", lambda number: {"input": question(number), "max_output_tokens": 16, "stream": True}, of_response),
    ("/v1/messages", lambda number: {"messages": conversation(number), "max_tokens": 16}, of_message),
    (
        "/v1/messages",
        lambda number: {"messages": conversation(number), "max_tokens": 16, "stream": True},
        of_message_stream,
    ),
]


def test_concurrent_requests_to_every_endpoint_get_their_own_ids(armed: RemoteOpenAIServer) -> None:
    def ask(number: int) -> Spoken:
        path, body, read = EVERY_ENDPOINT[number % len(EVERY_ENDPOINT)]
        # Hot, so that no two say the same.
        return read(post(armed, path, {"model": armed.model, "temperature": 1, **body(number)}))

    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(ask, range(256)))

    for number, answer in enumerate(answers):
        for spoken in answer:
            assert_own(number, *spoken)


def test_pipelined_requests_on_one_connection_never_mix(armed: RemoteOpenAIServer) -> None:
    """The requests are sent together: the server begins each within the context of the previous one."""
    bodies = [
        json.dumps({"model": armed.model, "input": question(number), "max_output_tokens": 16}).encode()
        for number in range(16)
    ]
    head = b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", armed.port), timeout=60) as connection:
        connection.sendall(b"".join(head % len(body) + body for body in bodies))
        answers = [next_answer(stream) for stream in [connection.makefile("rb")] * len(bodies)]

    for number, answer in enumerate(answers):
        (spoken,) = of_response(answer)
        assert_own(number, *spoken)
        assert "generations" not in answer


def assert_own(number: int, prompt: list[int], response: list[int], text: str) -> None:
    said = tokenizer().decode(prompt)
    assert question(number) in said
    assert said.count("Number") == 1
    assert characters(text.removeprefix(question(number))) in map(characters, texts(response))


def texts(response: list[int]) -> Iterator[str]:
    """Return the texts that vLLM may send for ids: it holds the last ones back until they end in a whole character."""
    for length in range(len(response), -1, -1):
        text = tokenizer().decode(response[:length], skip_special_tokens=True)
        yield text
        if not text.endswith("\ufffd"):
            return


def characters(text: str) -> str:
    """Drop replacement characters: their number depends on how many ids are decoded at once."""
    return text.replace("\ufffd", "")


def next_answer(stream: IO[bytes]) -> Any:
    headers = list(iter(stream.readline, b"\r\n"))
    (length,) = (int(header.partition(b":")[2]) for header in headers if header.lower().startswith(b"content-length"))
    return json.loads(stream.read(length))


def test_a_client_that_hangs_up_leaves_other_answers_intact(armed: RemoteOpenAIServer) -> None:
    logged = len(armed.log)
    for _ in range(5):
        with armed.client().chat.completions.create(
            model=armed.model, messages=MESSAGES, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))

    assert post(armed, CHAT, chat(armed))["response_token_ids"]
    assert "Traceback" not in armed.log[logged:]
    assert "agentlightning" not in armed.log[logged:]
