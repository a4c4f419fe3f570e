"""`GET /v1/agl/status`: what a server tells of itself."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import vllm
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.launchers import app as vllms_app
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

import agentlightning
from agentlightning import instrumentation
from tests.common.answers import get
from tests.common.vllm import RemoteOpenAIServer

STATUS = "/v1/agl/status"
PATCH_SETS = tuple(instrumentation.status())
# The scheduler is the engine core's.
ELSEWHERE = ("offline engine", "offline calls", "scheduler")
WHOLE = {name: {"state": "pending" if name in ELSEWHERE else "applied", "reason": None} for name in PATCH_SETS}


def status(server: RemoteOpenAIServer, **headers: str) -> dict[str, Any]:
    code, body = get(server, STATUS, **headers)
    assert code == 200, body
    return json.loads(body)


def test_the_status_describes_the_server_and_its_patches(armed: RemoteOpenAIServer) -> None:
    assert status(armed) == {
        "agentlightning": agentlightning.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "pid": armed.process.pid,
        "api_servers": 1,
        "switches": {
            "AGL_INSTRUMENT": "on",
            "AGL_RETURN_TOKEN_IDS": "all",
            "AGL_LOGPROBS": "off",
            "AGL_RECORD_OFFLINE": "off",
            "AGL_CONTINUE": "off",
            "AGL_SAMPLING": "off",
            "AGL_MODEL_NAMES": "served",
        },
        "patches": WHOLE,
        "counters": {"failures": {}, "ignored_ids": {}, "conflicting_names": {}, "skipped_probes": {}},
        "limits": [],
        "recording": None,
        "continuation": None,
        "sampling": None,
    }


def test_each_of_several_api_servers_answers_for_itself(two_api_servers: RemoteOpenAIServer) -> None:
    told = status(two_api_servers)

    assert told["api_servers"] == 2
    assert told["patches"] == WHOLE
    processes = psutil.Process(two_api_servers.process.pid).children(recursive=True)
    assert told["pid"] in {process.pid for process in processes}


def test_a_strict_server_that_started_is_patched_completely(guarded: RemoteOpenAIServer) -> None:
    told = status(guarded, Authorization="Bearer none")

    assert told["switches"] == {
        "AGL_INSTRUMENT": "strict",
        "AGL_RETURN_TOKEN_IDS": "response",
        "AGL_LOGPROBS": "off",
        "AGL_RECORD_OFFLINE": "off",
        "AGL_CONTINUE": "off",
        "AGL_SAMPLING": "off",
        "AGL_MODEL_NAMES": "served",
    }
    # All that there is to patch has been imported, to judge it.
    assert told["patches"] == dict.fromkeys(WHOLE, WHOLE["capture"])


@pytest.mark.parametrize("root_path", ["", "/root"])
def test_vllms_key_guards_the_status(guarded: RemoteOpenAIServer, root_path: str) -> None:
    assert get(guarded, root_path + STATUS)[0] == 401
    assert get(guarded, root_path + STATUS, Authorization="Bearer another")[0] == 401
    assert get(guarded, root_path + STATUS, Authorization="Bearer none")[0] == 200


def test_a_server_has_one_status_route(armed: RemoteOpenAIServer) -> None:
    assert armed.log.count(f"Route: {STATUS}, Methods: GET\n") == 1


def test_vllm_without_instrumentation_has_no_status_route(plain: RemoteOpenAIServer) -> None:
    assert get(plain, STATUS)[0] == 404


def test_vllms_schema_stays_unchanged(armed: RemoteOpenAIServer, plain: RemoteOpenAIServer) -> None:
    ours, vllms = (json.loads(get(server, "/openapi.json")[1])["paths"] for server in (armed, plain))

    assert ours.keys() == vllms.keys()
    assert not [path for path in ours if "agl" in path or "rollout" in path]


@pytest.mark.forked
def test_failures_while_serving_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(choices=[SimpleNamespace(index=0)])
    serving = OpenAIServingChat.__new__(OpenAIServingChat)

    async def create_chat_completion(self: Any, request: Any, raw_request: Any = None) -> Any:
        return broken

    async def serve_http(app: FastAPI, sock: Any) -> dict[str, Any]:
        for _ in range(2):
            asked = ChatCompletionRequest.model_validate({"messages": []})
            assert await serving.create_chat_completion(asked) is broken
        return TestClient(app).get(STATUS).json()

    monkeypatch.setattr(OpenAIServingChat, "create_chat_completion", create_chat_completion)
    monkeypatch.setattr(launcher, "serve_http", serve_http)
    instrumentation.instrument_vllm()

    told: Any = asyncio.run(launcher.serve_http(FastAPI(), None))

    assert told["counters"]["failures"] == {"/v1/chat/completions: attaching ids: AttributeError": 2}
    assert (told["pid"], told["api_servers"]) == (os.getpid(), 1)


@pytest.mark.forked
def test_our_middleware_stays_outermost_when_a_program_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []

    class Theirs:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            paths.append(scope["path"])
            await self.app(scope, receive, send)

    def build_app(args: Any) -> FastAPI:
        return FastAPI()

    # As in releases whose own build_app leaves the middleware to be put together by the first request.
    monkeypatch.setattr(vllms_app, "build_app", build_app)
    instrumentation.instrument_vllm()
    app: Any = vllms_app.build_app(None)  # type: ignore[arg-type]
    app.add_middleware(Theirs)

    assert TestClient(app).get(f"/rollout/x{STATUS}").status_code == 200
    assert paths == [STATUS]
