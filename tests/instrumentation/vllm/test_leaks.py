"""Leaks: however requests end, none of our objects stays in the server's process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from tests.common.answers import fetch, post
from tests.common.census import PATH
from tests.common.vllm import RemoteOpenAIServer

pytestmark = pytest.mark.tier("all")

REQUESTS = 10_000
AT_ONCE = 64
DEADLINE = 120
TEXT = "What is the capital of France?"
TOO_LONG = f"{TEXT} " * 200

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def chat(text: str, tokens: int, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, **options}


def completions(text: str, tokens: int, **options: Any) -> dict[str, Any]:
    return {"prompt": [text, "one"], "max_tokens": tokens, **options}


def responses(text: str, tokens: int, **options: Any) -> dict[str, Any]:
    # What is stored vLLM keeps for good.
    return {"input": text, "max_output_tokens": tokens, "store": False, **options}


def batch(text: str, tokens: int) -> dict[str, Any]:
    conversation = chat(text, tokens)["messages"]
    return {"messages": [conversation, conversation], "max_tokens": tokens}


Body = Callable[[str, int], dict[str, Any]]
KINDS: list[tuple[str, Body]] = [
    (CHAT, chat),
    (CHAT, lambda text, tokens: chat(text, tokens, stream=True)),
    (CHAT, lambda text, tokens: chat(text, tokens, stream=True, n=2)),
    (CHAT, lambda text, tokens: chat(text, tokens, return_token_ids=False)),
    (COMPLETIONS, completions),
    (COMPLETIONS, lambda text, tokens: completions(text, tokens, stream=True)),
    (COMPLETIONS, lambda text, tokens: completions(text, tokens, stream=True, echo=True)),
    (COMPLETIONS, lambda text, tokens: completions(text, tokens, use_beam_search=True, n=2)),
    (RESPONSES, responses),
    (RESPONSES, lambda text, tokens: responses(text, tokens, stream=True)),
    (RESPONSES, lambda text, tokens: responses(text, tokens, store=True, background=True)),
    (RESPONSES, lambda text, tokens: responses(text, tokens, store=True, background=True, stream=True)),
    ("/v1/messages", chat),
    ("/v1/messages", lambda text, tokens: chat(text, tokens, stream=True)),
    ("/v1/chat/completions/batch", batch),
]


CENSUS = "--middleware=tests.common.census.Census"
ENV = {"AGL_INSTRUMENT": "1", "PYTHONPATH": str(Path(__file__).parents[3])}


@pytest.fixture(scope="module")
def watched() -> Iterator[RemoteOpenAIServer]:
    """A server that counts our objects, and keeps running when its engine has died."""
    env = {**ENV, "VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}
    with RemoteOpenAIServer(CENSUS, env=env) as server:
        yield server


class Crowd:
    """Many clients at once that ask for all kinds of things; every other one hangs up at a random moment."""

    def __init__(
        self, server: RemoteOpenAIServer, client: aiohttp.ClientSession, kinds: Sequence[tuple[str, Body]]
    ) -> None:
        self._server = server
        self._client = client
        self._kinds = kinds
        self._chance = random.Random(0)
        self.outcomes: Counter[str] = Counter()

    async def ask(self, requests: int) -> None:
        left = iter(range(requests))

        async def one_after_the_other() -> None:
            for _ in left:
                await self._ask()

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))

    async def _ask(self) -> None:
        path, body = self._chance.choice(self._kinds)
        leaves = self._one_in(2)
        # Whoever leaves asks for so much that it is mostly before the end.
        asked = body(TOO_LONG if self._one_in(20) else TEXT, 64 if leaves else 2)
        if self._one_in(20):
            asked["temperature"] = "hot"
        cancels = leaves and "background" in asked and self._one_in(2)
        patience = self._chance.uniform(0, 0.5) if leaves and not cancels else DEADLINE
        try:
            self.outcomes[await asyncio.wait_for(self._answer(path, asked, cancels), patience)] += 1
        except asyncio.TimeoutError:
            self.outcomes["hung up"] += 1

    async def _answer(self, path: str, asked: dict[str, Any], cancels: bool) -> str:
        async with self._client.post(path, json={"model": self._server.model, **asked}) as response:
            async for chunk in response.content.iter_any():
                if cancels and (match := re.search(rb'"id":"(resp_\w+)"', chunk)):
                    async with self._client.post(f"{RESPONSES}/{match[1].decode()}/cancel") as cancelled:
                        # And leaves: once it is cancelled, vLLM never ends the stream of a background response.
                        return f"cancelled, {cancelled.status}"
        return str(response.status)

    def _one_in(self, number: int) -> bool:
        return self._chance.random() * number < 1


async def crowd(server: RemoteOpenAIServer, requests: int, kinds: Sequence[tuple[str, Body]] = KINDS) -> Counter[str]:
    """Send so many requests, and count their outcomes."""
    # A connection for each: on one that has been kept, an aborted request's would be missed by the next.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(server.url, connector=connector) as client:
        many = Crowd(server, client, kinds)
        await many.ask(requests)
    return many.outcomes


def left_over(server: RemoteOpenAIServer, expected: Mapping[str, int]) -> dict[str, int]:
    """Return what the server still holds, as soon as that is as little as expected, or after a time limit."""
    deadline = time.monotonic() + DEADLINE
    while (held := fetch(server, PATH)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return held


def test_ten_thousand_requests_half_of_them_aborted_leave_nothing(watched: RemoteOpenAIServer) -> None:
    at_first = fetch(watched, PATH)
    outcomes = asyncio.run(crowd(watched, REQUESTS))

    assert left_over(watched, at_first) == at_first == {"RequestContext": 1, "EngineRequest": 0}, "only who asks"
    assert min(outcomes[each] for each in ("200", "400", "hung up", "cancelled, 200")) > REQUESTS / 200, outcomes
    assert fetch(watched, STATUS_ROUTE)["counters"]["failures"] == {}


async def kill_under_streams(server: RemoteOpenAIServer, engine: psutil.Process) -> None:
    """Kill the engine during a stream of each kind, and read each to its end if it has one."""
    async with aiohttp.ClientSession(server.url) as client:

        async def begin(path: str, body: Body) -> aiohttp.ClientResponse:
            response = await client.post(path, json={"model": server.model, **body(TEXT, 900)})
            assert await response.content.readany()
            return response

        streamed = [(path, body) for path, body in KINDS if "stream" in body(TEXT, 1)]
        streams = await asyncio.gather(*(begin(path, body) for path, body in streamed))
        engine.kill()
        for (_, body), stream in zip(streamed, streams, strict=True):
            # vLLM would never end that of a background response.
            if "background" not in body(TEXT, 1):
                with contextlib.suppress(aiohttp.ClientError):
                    await stream.read()


def test_streams_whose_engine_died_leave_nothing(watched: RemoteOpenAIServer) -> None:
    """This test must be last: without an engine the server answers only errors."""
    at_first = fetch(watched, PATH)
    (engine,) = (each for each in psutil.Process(watched.process.pid).children() if "EngineCore" in each.name())

    asyncio.run(kill_under_streams(watched, engine))
    assert left_over(watched, at_first) == at_first

    outcomes = asyncio.run(crowd(watched, 100))
    assert outcomes["500"]
    assert left_over(watched, at_first) == at_first


def test_requests_for_embeddings_leave_nothing() -> None:
    asked = {"input": [TEXT, "one"], "encoding_format": "float"}
    with RemoteOpenAIServer(CENSUS, "--runner=pooling", "--convert=embed", env=ENV) as server:
        at_first = fetch(server, PATH)
        answer = post(server, "/v1/embeddings", {"model": server.model, **asked})
        outcomes = asyncio.run(
            crowd(server, 500, [("/v1/embeddings", lambda text, tokens: {"input": [text] * tokens})])
        )

        assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
        assert left_over(server, at_first) == at_first
        assert min(outcomes[each] for each in ("200", "400", "hung up")) > 10, outcomes
        assert fetch(server, STATUS_ROUTE)["counters"]["failures"] == {}
