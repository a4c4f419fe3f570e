"""`/rollout/{rollout_id}[/attempt/{attempt_id}]/v1/...`, which is the same as `/v1/...`."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

import httpx
import openai
import pytest

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._context import RequestContextMiddleware
from tests.common.answers import gather, get
from tests.common.vllm import RemoteOpenAIServer

MODELS = "/v1/models"
MESSAGES: Any = [{"role": "user", "content": "one two three"}]

GUARDED = {
    "/rollout/x/v1/models": MODELS,
    "/rollout/x/attempt/1/v1/models": MODELS,
    "/rollout/a%2Fb/v1/models": MODELS,
    "/rollout/a%2Fb/attempt/%2F/v1/models": MODELS,
    "/rollout/%F0%9F%98%80/v1/models": MODELS,
    "/rollout/a%20b/v1/models": MODELS,
    "/rollout/attempt/v1/models": MODELS,
    "/rollout/rollout/v1/models": MODELS,
    "/rollout/x/%76%31/models": "/%76%31/models",
    "/rollout/x/v1%2Fmodels": "/v1%2Fmodels",
    f"/rollout/{'x' * 256}/v1/models": MODELS,
    f"/rollout/{'%78' * 256}/attempt/{'%F0%9F%98%80' * 256}/v1/models": MODELS,
}
"""Well-formed prefixes, and the rest of the path."""

NOWHERE = {
    "/rollout/x": None,
    "/rollout/x/": "/",
    "/rollout/v1/models": "/models",
    "/rollout//v1/models": None,
    "/rollout/x//v1/models": "//v1/models",
    "/rollout/x/./v1/models": "/./v1/models",
    "/rollout/x/%2e%2e/v1/models": "/%2e%2e/v1/models",
    "/rollout/x/../../v1/models": "/../../v1/models",
    "/rollout/x%2Fv1/models": "/models",
    "/rollout/x/V1/models": "/V1/models",
    "/rollout/x/%2576%2531/models": "/%2576%2531/models",
    "/rollout/x/rollout/y/v1/models": "/rollout/y/v1/models",
    "/rollout/x/attempt/1/attempt/2/v1/models": "/attempt/2/v1/models",
    "/rollout/x/attempt//v1/models": "/attempt//v1/models",
    "/Rollout/x/v1/models": None,
    "/%72ollout/x/v1/models": None,
    "/rollout%2Fx/v1/models": None,
    "//rollout/x/v1/models": None,
    "/./rollout/x/v1/models": None,
    f"/rollout/{'x' * 257}/v1/models": None,
    f"/rollout/x/attempt/{'x' * 257}/v1/models": None,
    "/rollout/x%0a/v1/models": None,
    "/rollout/x%00/v1/models": None,
    "/rollout/x/attempt/%1b%5b/v1/models": None,
    "/rollout/%ff/v1/models": None,
    "/rollout/../v1/models": None,
    "/rollout/%2e%2E/v1/models": None,
    "/rollout/x%2F..%2Fy/v1/models": None,
    "/rollout/x/attempt/%27/v1/models": None,
}
"""Paths without a route: malformed prefixes, which stay (None), and prefixes of unknown paths."""

KEY = {"Authorization": "Bearer none"}


def scope_of(path: str, **others: Any) -> dict[str, Any]:
    """Return a request's scope, as a server makes it."""
    return {"type": "http", "path": unquote(path), "raw_path": path.encode(), "root_path": "", **others}


def passed_on(scope: dict[str, Any]) -> dict[str, Any]:
    """Return the scope that reaches the app behind the middleware, without what names a rollout in it then."""
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    before = dict(scope)

    async def ask() -> None:
        # In a task, as a server's: what it is done for stays in there.
        await RequestContextMiddleware(app)(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert scope == before, "others hold it too"
    (scope,) = scopes
    return {name: value for name, value in scope.items() if name not in ("headers", "agentlightning.context")}


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(("path", "rest"), [*GUARDED.items(), *NOWHERE.items()])
def test_a_valid_prefix_is_removed_once_and_a_malformed_one_stays(path: str, rest: str | None, kind: str) -> None:
    scope = scope_of(path, type=kind, query_string=b"a=/rollout/x/v1", method="GET")

    expected = scope if rest is None else {**scope, "path": unquote(rest), "raw_path": rest.encode()}
    assert passed_on(scope) == expected


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/root/rollout/x/v1/models", "/root/v1/models"),
        ("/root/rollout/x/attempt/1/v1/models", "/root/v1/models"),
        ("/rollout/x/v1/models", "/v1/models"),
        ("/rollout/x/root/v1/models", "/root/v1/models"),
        ("/root/root/rollout/x/v1/models", None),
        ("/roots/rollout/x/v1/models", None),
        ("/%72oot/rollout/x/v1/models", None),
    ],
)
def test_a_root_path_stays_in_front_of_the_rest(path: str, rest: str | None) -> None:
    scope = scope_of(path, root_path="/root")

    expected = scope if rest is None else {**scope, "path": rest, "raw_path": rest.encode()}
    assert passed_on(scope) == expected


def test_a_scope_without_raw_path_is_understood() -> None:
    scope = {"type": "http", "path": "/rollout/x y/v1/models"}

    assert passed_on(scope) == {**scope, "path": MODELS, "raw_path": b"/v1/models"}


@pytest.mark.parametrize(
    "scope",
    [
        {"type": "lifespan"},
        scope_of("/v1/models"),
        scope_of("/rollouts/x/v1/models"),
        scope_of("/v1/../rollout/x/v1/models"),
    ],
)
def test_other_scopes_pass_unchanged(scope: dict[str, Any]) -> None:
    assert passed_on(scope) == scope


def location_of(scope: dict[str, Any], location: str, status: int = 307) -> str:
    """Return where a client is sent by an app that redirects everybody to `location`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"location", location.encode())]})
        await send({"type": "http.response.body", "body": b""})

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(RequestContextMiddleware(app)(scope, None, send))  # type: ignore[arg-type]
    start, _ = messages
    return dict(start["headers"])[b"location"].decode()


HOST = {"headers": [(b"host", b"vllm:8000")]}


@pytest.mark.parametrize(
    ("path", "location", "expected"),
    [
        ("/rollout/x/v1/models/", "http://vllm:8000/v1/models", "http://vllm:8000/rollout/x/v1/models"),
        ("/rollout/x/metrics", "http://vllm:8000/metrics/?a=/b", "http://vllm:8000/rollout/x/metrics/?a=/b"),
        ("/rollout/x/v1/models/", "/v1/models", "/rollout/x/v1/models"),
        ("/rollout/a%2Fb/attempt/%e2%82%ac/v1/models/", "/v1/models", "/rollout/a%2Fb/attempt/%e2%82%ac/v1/models"),
        ("/rollout/x/v1/a%20b/", "http://vllm:8000/v1/a%20b", "http://vllm:8000/rollout/x/v1/a%20b"),
        # Whatever else an app redirects to, it means that.
        ("/rollout/x/v1/models/", "http://another:8000/v1/models", None),
        ("/rollout/x/v1/models/", "http://vllm:8000/login", None),
        ("/rollout/x/v1/models/", "/", None),
        ("/v1/models/", "http://vllm:8000/v1/models", None),
        ("/rollout//v1/models/", "http://vllm:8000/rollout//v1/models", None),
    ],
)
def test_a_redirect_to_the_same_path_keeps_the_prefix(path: str, location: str, expected: str | None) -> None:
    assert location_of(scope_of(path, **HOST), location) == (expected or location)


@pytest.mark.parametrize(
    ("path", "location", "expected"),
    [
        ("/root/rollout/x/v1/models/", "/root/v1/models", "/root/rollout/x/v1/models"),
        ("/rollout/x/root/v1/models/", "/root/v1/models", "/rollout/x/root/v1/models"),
        # As newer and as older releases of Starlette answer.
        ("/rollout/x/v1/models/", "/v1/models", "/rollout/x/v1/models"),
        ("/rollout/x/v1/models/", "/root/v1/models", "/root/rollout/x/v1/models"),
    ],
)
def test_a_redirect_keeps_the_root_path_before_the_prefix(path: str, location: str, expected: str) -> None:
    assert location_of(scope_of(path, root_path="/root", **HOST), location) == expected


def test_a_location_without_a_redirect_stays_unchanged() -> None:
    assert location_of(scope_of("/rollout/x/v1/models/", **HOST), "/v1/models", status=201) == "/v1/models"


def client(server: RemoteOpenAIServer, before: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}{before}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("prefix", ["/rollout/x", "/rollout/x/attempt/1", "/rollout/a%2Fb%20c"])
def test_an_answer_below_a_prefix_is_the_same(armed: RemoteOpenAIServer, prefix: str) -> None:
    def chat(before: str, **options: Any) -> Any:
        return client(armed, before).chat.completions.create(
            model=armed.model, messages=MESSAGES, max_tokens=12, temperature=0, **options
        )

    ours, expected = chat(prefix), chat("")
    assert ours.response_token_ids == expected.response_token_ids != []
    assert ours.prompt_token_ids == expected.prompt_token_ids
    assert gather(chat(prefix, stream=True)).token_ids == {0: expected.response_token_ids[0]}


@pytest.mark.parametrize("before", ["/root/rollout/x", "/rollout/x", "/root/rollout/x/attempt/1", "/root"])
def test_a_prefix_below_a_root_path_is_removed(guarded: RemoteOpenAIServer, before: str) -> None:
    answer: Any = client(guarded, before).completions.create(
        model=guarded.model, prompt="one two", max_tokens=4, temperature=0
    )

    assert answer.response_token_ids == [answer.choices[0].token_ids]


@pytest.mark.parametrize(
    "path", [*GUARDED, *(f"/root{path}" for path in GUARDED), "/rollout/x/root/v1/models", "/rollout/x/v1/agl/status"]
)
def test_vllms_key_guards_paths_below_a_prefix(guarded: RemoteOpenAIServer, path: str) -> None:
    assert get(guarded, path)[0] == 401
    assert get(guarded, path, Authorization="Bearer another")[0] == 401
    assert get(guarded, path, **KEY)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *NOWHERE,
        *(f"/root{path}" for path in NOWHERE),
        "/root/rollout/x/root/v1/models",
        "/root/root/rollout/x/v1/models",
        "/%72oot/rollout/x/v1/models",
        "/roots/rollout/x/v1/models",
        "/rollout/x/rootv1/models",
    ],
)
def test_an_unknown_path_below_a_prefix_is_vllms_404(guarded: RemoteOpenAIServer, path: str) -> None:
    vllms = b'{"detail":"Not Found"}'

    assert get(guarded, path) == (404, vllms)
    assert get(guarded, path, **KEY) == (404, vllms)


def test_a_path_without_a_guard_needs_no_key_below_a_prefix(guarded: RemoteOpenAIServer) -> None:
    assert get(guarded, "/rollout/x/health")[0] == 200


@pytest.mark.parametrize("before", ["/root/rollout/a%2Fb/attempt/%E2%82%AC", "/rollout/x%20y", "/root", ""])
@pytest.mark.parametrize("query", ["", "?a=%2F"])
def test_a_final_slash_is_redirected_below_the_prefix(guarded: RemoteOpenAIServer, before: str, query: str) -> None:
    url = f"{guarded.url}{before}/v1/models"
    answer = httpx.get(f"{url}/{query}", headers=KEY)

    assert (answer.status_code, answer.headers["location"]) == (307, f"{url}{query}")


def test_a_prefix_is_unknown_without_instrumentation(plain: RemoteOpenAIServer) -> None:
    assert get(plain, "/rollout/x/v1/models")[0] == 404


@pytest.mark.tier("check")
@pytest.mark.parametrize(
    ("path", "headers", "pins"),
    [
        ("/rollout/x/sampling/temperature=0.7,top_p=0.9/v1/models", {}, {"temperature": 0.7, "top_p": 0.9}),
        ("/rollout/x/attempt/1/sampling/client/v1/models", {}, {}),
        ("/rollout/x/v1/models", {"x-agl-sampling": "top_k=5"}, {"top_k": 5}),
        ("/rollout/x/sampling/min_p=0.1/v1/models", {"x-agl-sampling": "top_k=5"}, {"min_p": 0.1}),
        (MODELS, {"authorization": "Bearer k@rollout=x,sampling=temperature%3D0.7"}, {"temperature": 0.7}),
        ("/rollout/x/v1/models", {}, None),
    ],
    ids=["path", "path with an attempt", "header", "path before header", "key", "none"],
)
def test_the_pins_of_a_rollout_arrive_in_the_context_of_its_request(
    path: str, headers: dict[str, str], pins: dict[str, float] | None
) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        context = _context.current()
        assert context is not None
        seen.append((scope["path"], context.rollout_id, context.sampling))

    scope = {
        "type": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(RequestContextMiddleware(app)(scope, None, None))  # type: ignore[arg-type]

    assert seen == [(MODELS, "x", pins)]
