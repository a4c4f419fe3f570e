"""The server around the answers: ways to start it, several processes, many clients, clients that leave."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil

from tests.common.answers import gather, joined, post, steady
from tests.common.reference import tokenizer
from tests.common.vllm import RemoteOpenAIServer

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


def processes_that_serve(server: RemoteOpenAIServer) -> set[int]:
    """The processes that hold the server's side of a connection, while the clients keep theirs."""
    return {
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == server.port
    }


def test_without_either_vllm_is_untouched(plain: RemoteOpenAIServer) -> None:
    answer = post(plain, CHAT, chat(plain))

    assert answer["prompt_token_ids"] is None
    assert answer["choices"][0]["token_ids"] is None
    assert "response_token_ids" not in answer
    assert "agentlightning" not in plain.log


def test_sixty_four_requests_at_once_never_mix(armed: RemoteOpenAIServer) -> None:
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


def test_a_client_that_hangs_up_harms_nobody(armed: RemoteOpenAIServer) -> None:
    for _ in range(5):
        with armed.client().chat.completions.create(
            model=armed.model, messages=MESSAGES, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))

    assert post(armed, CHAT, chat(armed))["response_token_ids"]
    assert "Traceback" not in armed.log
    assert "agentlightning" not in armed.log
