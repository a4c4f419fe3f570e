"""Token ids in the answers of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints.answer import Carried, add_response_token_ids
from agentlightning.instrumentation.vllm.endpoints.endpoint import Endpoint, Output, StreamedIds, with_results
from agentlightning.instrumentation.vllm.endpoints.fields import ExtraField, model_of
from agentlightning.instrumentation.vllm.endpoints.sse import edited
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["RESPONSE_PATCHES", "SERVING_PATCHES"]


def attach(response: Any, request: Any, carried: Carried) -> None:
    """The answer has `prompt_token_ids` and each choice's `token_ids`: add `response_token_ids`."""
    if not carried.prompt:
        response.prompt_token_ids = None
    add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, carried: Carried) -> AsyncGenerator[str, None]:
    """The stream has all that it should; its prompt ids may be one thing too many."""
    return stream if carried.prompt else edited(stream, "prompt_token_ids", _drop_prompt_ids)


def _is_embedded(serving: Any, request: Any) -> bool:
    """Whether some of the prompt is embeddings: vLLM has placeholders for them among its ids."""
    # Off in most servers, which need not look through every message of every request.
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
    # vLLM's Anthropic and Cohere endpoints are subclasses that turn a chat answer into one of theirs: chunks that
    # they do not expect would change it. A subclass from outside vLLM still answers chat requests.
    vllms_own = next((cls for cls in type(serving).__mro__ if cls.__module__.startswith("vllm.")), None)
    return vllms_own is None or vllms_own.__name__ == "OpenAIServingChat"


def _asks_vllm(request: Any) -> bool:
    return _releases.gives_token_ids(type(request))


ENDPOINT = Endpoint(
    "/v1/chat/completions", attach, trim, asks_vllm=_asks_vllm, serves=_answers_chat, is_embedded=_is_embedded
)


def with_ids_taken(build: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `chat_completion_full_generator`: one choice for each output of the last result."""
    build_from = with_results(build)

    async def chat_completion_full_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not ENDPOINT.takes(self, request).response:
            return await build(self, request, *args, **kwargs)
        last = None

        async def noted(results: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
            nonlocal last
            async for last in results:
                yield last

        response = await build_from(noted, self, request, *args, **kwargs)
        if hasattr(response, "choices"):
            contained(f"{ENDPOINT.name}: taking ids", _take, response, last)
        return response

    return chat_completion_full_generator


def _take(response: Any, result: Any) -> None:
    token_ids = {output.index: list(output.token_ids) for output in result.outputs}
    for choice in response.choices:
        choice.token_ids = token_ids[choice.index]
    response.prompt_token_ids = result.prompt_token_ids


def with_streamed_ids_taken(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `chat_completion_stream_generator`: one chunk for each delta, or none where a parser waits."""
    generate_from = with_results(generate)

    def chat_completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        carried = ENDPOINT.takes(self, request)
        if not carried.response:
            return generate(self, request, *args, **kwargs)
        ids = _StreamedIds(carried)
        return ids.put_on(generate_from(ids.noted, self, request, *args, **kwargs))

    return chat_completion_stream_generator


class _StreamedIds(StreamedIds):
    def outputs(self, result: Any) -> Iterable[Output]:
        return (Output(output.index, result.prompt_token_ids, output.token_ids) for output in result.outputs)

    def holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        return chunk

    def says_something(self, choice: dict[str, Any]) -> bool:
        # A choice's first chunk says whose turn it is.
        return "role" not in choice["delta"]

    def silent(self, index: int) -> dict[str, Any]:
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
        Wrap("OpenAIServingChat.chat_completion_full_generator", ("request", "result_generator"), with_ids_taken),
    ),
    Where(
        _loses_ids,
        Wrap(
            "OpenAIServingChat.chat_completion_stream_generator",
            ("request", "result_generator"),
            with_streamed_ids_taken,
        ),
    ),
)
