"""Apps of a program's own: what names a rollout is taken off their paths and keys, too, as off those of vLLM's app."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import fastapi
import httpx
import pytest
from fastapi import FastAPI, Request, Response

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._apps import PATCHES, add_middleware
from agentlightning.instrumentation.vllm._isolation import failures
from agentlightning.patching import PatchSet, State

pytestmark = [pytest.mark.forked, pytest.mark.tier("check")]

CHAT = "/v1/chat/completions"
KEY = "Bearer K@rollout=ro-key,agent=planner"


@pytest.fixture
def patches() -> Iterator[PatchSet]:
    patches = PatchSet("own apps", ["serving"], PATCHES)
    patches.apply(ModuleType("serving"))
    assert patches.status.state is State.APPLIED
    yield patches
    patches.undo()


def app_of(path: str) -> FastAPI:
    """Make an app with a route, which answers with what it is asked and which rollout that is for."""
    app = FastAPI()

    @app.post(path)
    async def answer(request: Request) -> dict[str, Any]:
        context = _context.context_of(request)
        names = context.rollout_id, context.attempt_id, context.calling_agent_id
        return {"path": request.url.path, "key": request.headers.get("authorization"), "names": names}

    return app


def without_routes(app: FastAPI) -> FastAPI:
    """Make an app that hands each request on to another one by middleware, as a proxy does, with a scope of its own."""
    proxy = FastAPI()

    @proxy.middleware("http")
    async def forward(request: Request, _: Any) -> Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
            answer = await client.request(request.method, request.url.path, headers=dict(request.headers))
        return Response(answer.content, answer.status_code, media_type="application/json")

    return proxy


class Around:
    """Middleware that hands on a copy of each scope."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app({**scope}, receive, send)


def ask(app: Any, path: str, **headers: str) -> Any:
    """Return the body of an answer, or else its status."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(path, headers=headers)

    response = asyncio.run(post())
    return response.json() if response.is_success else response.status_code


def test_a_rollout_in_the_path_or_the_key_is_taken_off(patches: PatchSet) -> None:
    app = app_of(CHAT)

    plain = {"path": CHAT, "key": None}
    assert ask(app, CHAT) == {**plain, "names": [None, None, None]}
    assert ask(app, f"/rollout/ro-1/attempt/at-1{CHAT}") == {**plain, "names": ["ro-1", "at-1", None]}
    assert ask(app, f"/rollout/ro-1{CHAT}", **{"x-agl-agent-id": "critic"})["names"] == ["ro-1", None, "critic"]
    named = ["ro-key", None, "planner"]
    assert ask(app, CHAT, authorization=KEY) == {"path": CHAT, "key": "Bearer K", "names": named}
    assert ask(app, "/rollout/ro-1/nowhere") == 404


def test_a_route_of_the_programs_own_keeps_its_path(patches: PatchSet) -> None:
    path = "/rollout/ro-1/v1/generate"

    assert ask(app_of("/rollout/{name}/v1/generate"), path)["path"] == path
    assert ask(app_of("/{anything:path}"), path)["path"] == path


def test_a_key_is_taken_off_on_a_route_that_begins_as_a_prefix_does(patches: PatchSet) -> None:
    path = "/rollout/ro-1/v1/generate"

    found = ask(app_of("/rollout/{name}/v1/generate"), path, authorization=KEY)

    assert found == {"path": path, "key": "Bearer K", "names": ["ro-key", None, "planner"]}


@pytest.mark.parametrize(
    ("path", "headers", "names"),
    [
        (f"/rollout/ro-1/attempt/at-1{CHAT}", {}, ["ro-1", "at-1", None]),
        (CHAT, {"authorization": KEY}, ["ro-key", None, "planner"]),
        (f"/rollout/ro-1{CHAT}", {"x-agl-agent-id": "critic"}, ["ro-1", None, "critic"]),
        (CHAT, {"authorization": KEY, "x-agl-rollout-id": "ro-header"}, ["ro-header", None, None]),
    ],
)
def test_an_app_that_forwards_requests_passes_the_rollout_on(
    patches: PatchSet, path: str, headers: dict[str, str], names: list[str | None]
) -> None:
    vllms = app_of(CHAT)
    add_middleware(vllms)
    routed = without_routes(vllms)
    routed.post(CHAT)(lambda: None)

    for proxy in (without_routes(vllms), routed):
        assert ask(proxy, path, **headers)["names"] == names


def test_an_app_that_has_neither_path_gets_it_as_it_came(patches: PatchSet) -> None:
    seen: list[str] = []
    app = app_of(CHAT)

    @app.middleware("http")
    async def note(request: Request, call: Any) -> Response:
        seen.append(request.url.path)
        return await call(request)

    assert ask(app, "/rollout/ro-1/nowhere") == 404
    assert seen == ["/rollout/ro-1/nowhere"]


def test_a_rollout_is_known_behind_middleware_that_copies_the_scope(patches: PatchSet) -> None:
    vllms = app_of(CHAT)
    add_middleware(vllms)
    around = FastAPI()
    around.mount("/llm", Around(vllms))
    around.add_middleware(Around)

    for headers, path, names in (
        ({}, f"/rollout/rö-1/attempt/at-1/llm{CHAT}", ["rö-1", "at-1", None]),
        ({"authorization": KEY}, f"/llm{CHAT}", ["ro-key", None, "planner"]),
    ):
        assert ask(around, path, **headers)["names"] == names


def test_an_app_that_cannot_be_hashed_answers(patches: PatchSet) -> None:
    class Unhashable(FastAPI):
        __hash__: Any = None

    app = Unhashable()
    app.mount("/", app_of(CHAT))

    assert ask(app, CHAT)["path"] == CHAT
    assert ask(app, CHAT, authorization=KEY)["names"] == ["ro-key", None, "planner"]
    assert not failures


def test_vllms_app_takes_off_one_prefix_also_within_another_app(patches: PatchSet) -> None:
    vllms = app_of(CHAT)
    add_middleware(vllms)
    around = FastAPI()
    around.mount("/llm", vllms)

    for app, path in ((vllms, CHAT), (around, f"/llm{CHAT}")):
        assert ask(app, f"/rollout/ro-1{path}")["names"] == ["ro-1", None, None]
        assert ask(app, f"/rollout/ro-1/rollout/ro-2{path}") == 404
        assert ask(app, path, authorization=KEY)["names"] == ["ro-key", None, "planner"]
    assert ask(around, f"/llm/rollout/ro-1{CHAT}")["names"] == ["ro-1", None, None]


def test_without_the_patch_it_is_an_unknown_path(patches: PatchSet) -> None:
    patches.undo()

    assert ask(app_of(CHAT), f"/rollout/ro-1{CHAT}") == 404
    assert not hasattr(fastapi.FastAPI.__mro__[1].__call__, "__agl_patched__")
