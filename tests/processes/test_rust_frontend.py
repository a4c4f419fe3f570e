"""vLLM's Rust frontend, a binary: nothing of ours takes part in its answers, which are vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.common.answers import get, post
from tests.common.reference import greedy
from tests.common.rust_frontend import rust_frontend
from tests.common.vllm import RemoteOpenAIServer, run
from tests.processes.every_endpoint import MESSAGES, TOKENS, prompt_token_ids

pytestmark = pytest.mark.tier("all")

WHY = (
    "agentlightning: vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND) answers without Python, "
    'with token ids only where a request says "return_token_ids": true'
)


@pytest.fixture(scope="module")
def rust() -> Iterator[RemoteOpenAIServer]:
    frontend = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(rust_frontend())}
    with RemoteOpenAIServer(env={**frontend, "AGL_INSTRUMENT": "1"}) as server:
        yield server


def ask(server: RemoteOpenAIServer, route: str, **options: Any) -> Any:
    return post(server, route, {"model": server.model, "max_tokens": TOKENS, "temperature": 0, **options})


def chat(server: RemoteOpenAIServer, **options: Any) -> Any:
    return ask(server, "/v1/chat/completions", messages=MESSAGES, **options)


def test_a_request_for_ids_gets_them(rust: RemoteOpenAIServer) -> None:
    prompt = prompt_token_ids()
    answer = chat(rust, return_token_ids=True)
    chunks = chat(rust, return_token_ids=True, stream=True)
    completion = ask(rust, "/v1/completions", prompt=prompt, return_token_ids=True)

    assert answer["prompt_token_ids"] == completion["choices"][0]["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == completion["choices"][0]["token_ids"] == greedy(prompt, TOKENS)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [ids for choice in choices for ids in choice.get("token_ids") or []] == greedy(prompt, TOKENS)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_request_without_return_token_ids_gets_no_ids(rust: RemoteOpenAIServer, stream: bool) -> None:
    assert "_ids': [" not in str(chat(rust, stream=stream))


def test_the_log_warns_once(rust: RemoteOpenAIServer) -> None:
    assert rust.log.count(WHY) == rust.log.count("agentlightning: ") == 1


def test_doctor_says_that_the_instrumentation_does_not_answer(rust: RemoteOpenAIServer) -> None:
    said = run("agl", "doctor", "--url", rust.url)

    assert said.returncode != 0
    # Wherever its lines are wrapped.
    told = " ".join(said.stdout.split())
    assert "vLLM's Rust frontend that answers, with token ids only where a request asks for them" in told
    assert get(rust, "/v1/agl/status")[0] == 404
