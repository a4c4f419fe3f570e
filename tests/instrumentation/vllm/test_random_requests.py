"""Ten thousand random requests from the server's own schema, to an instrumented server and to a plain one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import hypothesis
import psutil
from hypothesis import strategies as st

from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from tests.common.answers import fetch
from tests.common.vllm import RemoteOpenAIServer

REQUESTS = 10_000
FEWER_REQUESTS = 600
WARM_UP, LESS_WARM_UP = 1000, 200
AT_ONCE = 32
DEADLINE = 120
MEGABYTES = 4
"""The most by which one server may outgrow the other in each half: less than a kilobyte per request."""

TEXT = "What is the capital of France?"
CHAT: Any = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2}
COMPLETION: Any = {"prompt": TEXT, "max_tokens": 2}
RESPONSE: Any = {"input": TEXT, "max_output_tokens": 2}
GENERATING: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"]] * 2},
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": CHAT,
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}},
}
INFORMING: dict[str, Any] = {
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/v1/chat/completions/render": CHAT,
    "/v1/completions/render": COMPLETION,
    "/v1/responses/render": RESPONSE,
    "/v1/messages/render": CHAT,
    "/tokenize": {"prompt": TEXT},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""Routes, each with a request that is answered. Not the routes that scale, abort or cancel: what one of those did would
depend on the others."""
ROUTES = {**GENERATING, **INFORMING}

# A request could ask for as much as the model can hold, and for another model than there is.
LEFT_ALONE = {"model", "max_tokens", "max_completion_tokens", "max_output_tokens", "stream", "return_token_ids"}
PREFIXES = ("", "", "/rollout/x", "/rollout/a%2Fb/attempt/1")

NONSENSE: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.floats()
    # With halves of surrogate pairs, which JSON can say and UTF-8 cannot.
    | st.text(st.characters(), max_size=8)
    | st.sampled_from([-(2**63), 2**31, 2**64, 10**400, "\0", TEXT * 200]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)

ERROR = re.compile(r'"error":{[^{}]*"code":"?(\w+)')
"""An error within a stream, whose status was 200, as the locked version of vLLM sends it."""


@dataclass(frozen=True)
class Request:
    """A request; only the instrumented server gets its prefix."""

    prefix: str
    path: str
    body: bytes


def test_random_requests_are_answered_as_by_vllm_and_leak_no_memory(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, thorough: bool
) -> None:
    servers = (armed, plain)
    count = REQUESTS if thorough else FEWER_REQUESTS
    requests = drawn(random_requests(fetch(plain, "/openapi.json"), plain.model), count)

    warm_up = WARM_UP if thorough else LESS_WARM_UP
    half = (warm_up + count) // 2
    outcomes = asyncio.run(answered(servers, requests[:warm_up]))
    before = [megabytes(server) for server in servers]
    outcomes += asyncio.run(answered(servers, requests[warm_up:half]))
    between = [megabytes(server) for server in servers]
    outcomes += asyncio.run(answered(servers, requests[half:]))
    after = [megabytes(server) for server in servers]

    assert not [pair for pair in zip(requests, outcomes, strict=True) if len(set(pair[1])) > 1]
    # What is never given back is taken again and again; an allocator that asks for more pages does it in one half.
    assert min(grown_apart(before, between), grown_apart(between, after)) < MEGABYTES, (before, between, after)
    assert fetch(armed, STATUS_ROUTE)["counters"]["failures"] == {}
    # Lest nothing was asked that there is an answer to.
    answers = [request.path for request, (_, outcome) in zip(requests, outcomes, strict=True) if outcome == "200"]
    assert min(map(answers.count, ROUTES)) > count / (100 if thorough else 200)


def drawn(strategy: st.SearchStrategy[Request], count: int) -> list[Request]:
    """Draw so many requests, the same ones each time."""
    requests: list[Request] = []

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    @hypothesis.given(strategy)
    def draw(request: Request) -> None:
        requests.append(request)

    draw()
    return requests


def random_requests(specification: Mapping[str, Any], model: str) -> st.SearchStrategy[Request]:
    """A sound request to one of the routes, but for a few fields that are as the schema allows them, or nonsense."""
    fields = {path: fields_of(specification, path) for path in ROUTES}
    # Twice: half of the informing ones do nothing but what these do first.
    paths = st.sampled_from([*GENERATING, *GENERATING, *INFORMING])
    said = st.sampled_from([{}, {"return_token_ids": True}, {"return_token_ids": False}])

    @st.composite
    def request(draw: st.DrawFn) -> Request:
        path = draw(paths)
        changed = draw(st.lists(st.sampled_from(list(fields[path])), max_size=3, unique=True))
        body = {
            "model": model,
            **ROUTES[path],
            "stream": draw(st.booleans()),
            **draw(said | st.fixed_dictionaries({"return_token_ids": NONSENSE})),
            **{name: draw(NONSENSE if draw(st.integers(0, 7)) == 0 else fields[path][name]) for name in changed},
        }
        return Request(draw(st.sampled_from(PREFIXES)), path, json.dumps(body).encode())

    return request()


def fields_of(specification: Mapping[str, Any], path: str) -> dict[str, st.SearchStrategy[Any]]:
    schema = specification["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = specification["components"]["schemas"]
    alternatives = [resolved(each, schemas) for each in schema.get("anyOf", [schema])]
    properties = {name: inner for each in alternatives for name, inner in each["properties"].items()}
    return {name: values(inner, schemas) for name, inner in properties.items() if name not in LEFT_ALONE}


def values(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int = 4) -> st.SearchStrategy[Any]:
    """Draw small values that a JSON schema allows."""
    schema = resolved(schema, schemas)
    if depth == 0:
        return NONSENSE
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([values(alternative, schemas, depth) for alternative in alternatives])
    if "properties" in schema:
        optional = {name: values(inner, schemas, depth - 1) for name, inner in schema["properties"].items()}
        required = {name: optional.pop(name) for name in schema.get("required", ()) if name in optional}
        return st.fixed_dictionaries(required, optional=optional)
    if schema.get("type") == "array":
        return st.lists(values(schema.get("items", {}), schemas, depth - 1), max_size=3)
    least = schema.get("minimum", -2)
    most = schema.get("maximum", least + 6)
    simple = {
        "string": st.text(max_size=8),
        "integer": st.integers(int(least), int(most)),
        "number": st.floats(least, most),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple.get(schema.get("type", ""), NONSENSE)


def resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


async def answered(
    servers: tuple[RemoteOpenAIServer, RemoteOpenAIServer], requests: Sequence[Request]
) -> list[tuple[str, str]]:
    """Return the outcomes of each request at the instrumented server and at the other."""
    turn = asyncio.Semaphore(AT_ONCE)
    # A connection for each: vLLM closes one that it has failed on.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(DEADLINE)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        async def outcome(url: str, body: bytes) -> str:
            async with client.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                try:
                    text = await response.text()
                except aiohttp.ClientPayloadError:
                    return f"{response.status}, cut off"
            errors = ERROR.findall(text) if response.status == 200 else []
            return ", ".join([str(response.status), *errors])

        async def ask_both(request: Request) -> tuple[str, str]:
            ours, vllms = servers
            async with turn:
                return await asyncio.gather(
                    outcome(f"{ours.url}{request.prefix}{request.path}", request.body),
                    outcome(f"{vllms.url}{request.path}", request.body),
                )

        return await asyncio.gather(*map(ask_both, requests))


def grown_apart(before: Sequence[float], after: Sequence[float]) -> float:
    """Return by how much the first server has outgrown the second."""
    ours, vllms = (now - then for now, then in zip(after, before, strict=True))
    return ours - vllms


def megabytes(server: RemoteOpenAIServer) -> float:
    return psutil.Process(server.process.pid).memory_info().rss / 2**20
