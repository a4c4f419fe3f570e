"""Facts read of every request where vLLM checks its model, on vLLM's own serving classes without their engines.

Audio needs packages and models that the tests do not have, so its endpoints are asked here and by no client.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest, ServingGenerativeScoring
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation

from agentlightning import instrumentation
from agentlightning.instrumentation.vllm import _context, _isolation
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import conversion
from agentlightning.instrumentation.vllm.capture.conversion import CapturedRequest

pytestmark = pytest.mark.forked

AUDIO: Any = {"file": SimpleNamespace(filename="a.wav")}


@pytest.fixture(autouse=True)
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_STORE", str(tmp_path / "generations.db"))
    instrumentation.instrument_vllm()


def checked(serving_class: type[Any], request: Any, headers: dict[bytes, bytes] | None = None) -> RequestContext:
    """Return the context of a request once vLLM has checked its model."""
    serving: Any = object.__new__(serving_class)
    serving.request_logger = None
    serving.model_config = SimpleNamespace(max_model_len=1000)
    serving.models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="served")], is_base_model=lambda name: True, lora_requests={}
    )
    context = RequestContext(scope={"headers": [*(headers or {}).items()]})

    async def check() -> None:
        _context._current.set(context)
        assert await serving._check_model(request) is None

    asyncio.run(check())
    assert not _isolation.failures
    return context


def chat(**options: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}], **options)


@pytest.mark.parametrize(
    "serving_class",
    [ServingGenerativeScoring, ServingStructuredDecisions, OpenAIServingTranscription, OpenAIServingTranslation],
)
def test_endpoints_without_patches_check_their_model_in_the_base_class(serving_class: type[Any]) -> None:
    assert serving_class._check_model is BaseServing._check_model


def test_decisions_check_their_model_in_the_base_class() -> None:
    decisions = pytest.importorskip("vllm.entrypoints.openai.decisions.serving", reason="came with vLLM 0.33")

    assert decisions.OpenAIServingDecisions._check_model is BaseServing._check_model


@pytest.mark.parametrize(
    ("serving_class", "request_class"),
    [(OpenAIServingTranscription, TranscriptionRequest), (OpenAIServingTranslation, TranslationRequest)],
)
def test_an_audio_request_names_its_model(serving_class: type[Any], request_class: Any) -> None:
    assert checked(serving_class, request_class.model_construct(**AUDIO, model="asked for")).model == "asked for"
    assert checked(serving_class, request_class.model_construct(**AUDIO, model=None)).model == "served"


@pytest.mark.parametrize(
    ("state", "base_id"),
    [({"request_metadata": SimpleNamespace(request_id="transcribe-abc")}, None), ({}, "abc")],
    ids=["vLLM's own", "the client's"],
)
def test_the_id_of_an_answer_to_audio_has_no_number_of_a_part(state: dict[str, Any], base_id: str | None) -> None:
    """Audio that is too long for one request is cut into several."""
    context = RequestContext(scope={"state": state}, base_id=base_id)

    for name in ("transcribe-abc", "transcribe-abc-1"):
        captured = CapturedRequest(name, 0.0, None, None, context)
        assert conversion._response_id(captured, context) == "transcribe-abc"


def test_ids_are_made_of_the_clients_or_vllms_own() -> None:
    scoring = GenerativeScoringRequest(query="a", items=["b"], label_token_ids=[1])

    assert checked(ServingGenerativeScoring, scoring).base_id == scoring.request_id
    assert checked(ServingGenerativeScoring, scoring, {b"x-request-id": b"mine"}).base_id == "mine"


@pytest.mark.parametrize(
    ("request_", "limit"),
    [
        (chat(), None),
        (chat(truncate_prompt_tokens=0), 0),
        (chat(truncate_prompt_tokens=7), 7),
        (chat(truncate_prompt_tokens=-1), 999),
        (chat(truncate_prompt_tokens=-1, max_tokens=10), 990),
        (chat(truncate_prompt_tokens=-1, max_completion_tokens=20, max_tokens=10), 980),
        (chat(use_beam_search=True), 0),
        (CompletionRequest.model_validate({"prompt": "a", "truncate_prompt_tokens": -1, "max_tokens": 10}), 990),
        (ResponsesRequest.model_validate({"input": "a"}), None),
        (ResponsesRequest.model_validate({"input": "a", "truncation": "disabled"}), None),
        (ResponsesRequest.model_validate({"input": "a", "truncation": "auto"}), 999),
        (ResponsesRequest.model_validate({"input": "a", "truncation": "auto", "max_output_tokens": 10}), 990),
    ],
)
def test_a_prompt_that_may_be_truncated_is_known_by_its_length(request_: Any, limit: int | None) -> None:
    assert checked(OpenAIServingChat, request_).text_limit == limit
