"""Token ids in the answers of `/v1/chat/completions`."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints.answer import IdFields, add_response_token_ids
from agentlightning.instrumentation.vllm.endpoints.endpoint import (
    ChoiceIds,
    Endpoint,
    StreamedIds,
    with_result_filter,
)
from agentlightning.instrumentation.vllm.endpoints.fields import ExtraField, model_of
from agentlightning.instrumentation.vllm.endpoints.sse import edit_stream
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["RESPONSE_PATCHES", "SERVING_PATCHES"]


def attach(response: Any, request: Any, fields: IdFields) -> None:
    """Add `response_token_ids` to an answer that has `prompt_token_ids` and each choice's `token_ids`."""
    if not fields.prompt:
        response.prompt_token_ids = None
    add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, fields: IdFields) -> AsyncGenerator[str, None]:
    """Remove the prompt ids from a stream that must not carry them."""
    return stream if fields.prompt else edit_stream(stream, "prompt_token_ids", _drop_prompt_ids)


def _is_embedded(serving: Any, request: Any) -> bool:
    """Tell whether any of the prompt is embeddings: vLLM has placeholders for them among its ids."""
    # Off in most servers, which then need not search every message of every request.
    if not getattr(getattr(serving, "model_config", None), "enable_prompt_embeds", False):
        return False
    contents = (message.get("content") for message in getattr(request, "messages", ()) if isinstance(message, dict))
    return any(_is_embeddings(part) for content in contents if isinstance(content, list) for part in content)


def _is_embeddings(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "prompt_embeds"


def _drop_prompt_ids(chunk: dict[str, Any]) -> None:
    if "prompt_token_ids" in chunk:
        chunk["prompt_token_ids"] = None


def _answers_chat(serving: Any) -> bool:
    return _is_chat(type(serving))


@functools.cache
def _is_chat(kind: type) -> bool:
    # vLLM's Anthropic and Cohere endpoints are subclasses that convert a chat answer: unexpected chunks would change
    # theirs. A subclass from outside vLLM still answers chat requests.
    vllms_own = next((cls for cls in kind.__mro__ if cls.__module__.startswith("vllm.")), None)
    return vllms_own is None or vllms_own.__name__ == "OpenAIServingChat"


def _asks_vllm(request: Any) -> bool:
    return _releases.gives_token_ids(type(request))


ENDPOINT = Endpoint(
    "/v1/chat/completions", attach, trim, asks_vllm=_asks_vllm, serves=_answers_chat, is_embedded=_is_embedded
)


def wrap_full_generator(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `chat_completion_full_generator`, which makes a choice of each output of the last result."""
    build_from = with_result_filter(build)

    async def chat_completion_full_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not ENDPOINT.fields_to_take(self, request).response:
            return await build(self, request, *args, **kwargs)
        last = None

        async def note_last(results: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
            nonlocal last
            async for last in results:
                yield last

        response = await build_from(note_last, self, request, *args, **kwargs)
        if hasattr(response, "choices"):
            contained(f"{ENDPOINT.name}: taking ids", _take, response, last)
        return response

    return chat_completion_full_generator


def _take(response: Any, result: Any) -> None:
    token_ids = {output.index: list(output.token_ids) for output in result.outputs}
    for choice in response.choices:
        choice.token_ids = token_ids[choice.index]
    response.prompt_token_ids = result.prompt_token_ids


def wrap_stream_generator(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `chat_completion_stream_generator`: one chunk per delta, or none while a parser waits for more."""
    generate_from = with_result_filter(generate)

    def chat_completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        fields = ENDPOINT.fields_to_take(self, request)
        if not fields.response:
            return generate(self, request, *args, **kwargs)
        ids = _StreamedIds(fields)
        return ids.attach_to(generate_from(ids.note, self, request, *args, **kwargs))

    return chat_completion_stream_generator


class _StreamedIds(StreamedIds):
    def ids_of(self, result: Any) -> Iterable[ChoiceIds]:
        return (ChoiceIds(output.index, result.prompt_token_ids, output.token_ids) for output in result.outputs)

    def prompt_holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        return chunk

    def is_from_engine(self, choice: dict[str, Any]) -> bool:
        # A choice's first chunk only has the role.
        return "role" not in choice["delta"]

    def empty_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}


def _loses_ids(module: ModuleType) -> bool:
    return not _releases.gives_token_ids(model_of(module, "ChatCompletionRequest"))


RESPONSE_PATCHES: tuple[Patch, ...] = (
    ExtraField("ChatCompletionResponse", "response_token_ids", list[list[int]] | None),
)
SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingChat.create_chat_completion", ENDPOINT.name),
    Wrap("OpenAIServingChat.create_chat_completion", ("request",), ENDPOINT.wrap),
    Where(
        _loses_ids,
        Wrap("OpenAIServingChat.chat_completion_full_generator", ("request", "result_generator"), wrap_full_generator),
    ),
    Where(
        _loses_ids,
        Wrap(
            "OpenAIServingChat.chat_completion_stream_generator",
            ("request", "result_generator"),
            wrap_stream_generator,
        ),
    ),
)
