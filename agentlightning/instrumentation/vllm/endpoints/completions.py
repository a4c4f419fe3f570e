"""Token ids in the answers of `/v1/completions`."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints.answer import IdFields, add_response_token_ids, return_token_ids_of
from agentlightning.instrumentation.vllm.endpoints.endpoint import (
    ChoiceIds,
    Endpoint,
    StreamedIds,
    with_result_filter,
)
from agentlightning.instrumentation.vllm.endpoints.sse import edit_stream
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]


def attach(response: Any, request: Any, fields: IdFields) -> None:
    """Add `response_token_ids` to an answer whose choices have their `prompt_token_ids` and `token_ids`."""
    hidden = _choices_without_prompt_ids(request, fields)
    for choice in response.choices:
        if choice.index < hidden:
            choice.prompt_token_ids = None
        if _generates_nothing(request) and choice.token_ids is not None:
            choice.token_ids = []
    add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, fields: IdFields) -> AsyncGenerator[str, None]:
    """Remove prompt ids that a stream must not carry, and the id that is generated only for an echo."""
    hidden = _choices_without_prompt_ids(request, fields)

    def drop_prompt_ids(chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            if choice["index"] < hidden and "prompt_token_ids" in choice:
                choice["prompt_token_ids"] = None

    if _generates_nothing(request):
        stream = edit_stream(stream, "token_ids", _drop_token_ids)
    return edit_stream(stream, "prompt_token_ids", drop_prompt_ids) if hidden else stream


def _drop_token_ids(chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        if choice.get("token_ids"):
            choice["token_ids"] = []


def _generates_nothing(request: Any) -> bool:
    # For an echo alone vLLM still has the engine generate one token, and leaves it out of the text.
    return request.echo and request.max_tokens == 0


def _choices_without_prompt_ids(request: Any, fields: IdFields) -> float:
    """Return how many choices, counted from the first, must show no prompt ids."""
    if not fields.prompt:
        return math.inf
    # Embedded prompts have no ids, vLLM gives zeros; it answers them before the others, n choices each.
    embeds = getattr(request, "prompt_embeds", None)  # from 0.10
    if embeds is None:
        return 0
    return (len(embeds) if isinstance(embeds, list) else 1) * (request.n or 1)


def _asks_vllm(request: Any) -> bool:
    # With echo, vLLM leaves out the prompt's text if it is asked for ids, and the client wants that text. So vLLM is
    # not asked, and the ids are taken, as in releases that have none or lose some.
    return _releases.gives_token_ids(type(request)) and (not request.echo or return_token_ids_of(request) is True)


ENDPOINT = Endpoint("/v1/completions", attach, trim, asks_vllm=_asks_vllm)


def wrap_build_response(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `request_output_to_completion_response`, which makes a choice of each output of each prompt."""

    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = build(self, final_res_batch, request, *args, **kwargs)
        if ENDPOINT.fields_to_take(self, request).response:
            contained(f"{ENDPOINT.name}: taking ids", _take, response, final_res_batch)
        return response

    return request_output_to_completion_response


def _take(response: Any, final_res_batch: Any) -> None:
    outputs = [(result.prompt_token_ids, output) for result in final_res_batch for output in result.outputs]
    # All are paired before the first is changed.
    for choice, (prompt_token_ids, output) in list(zip(response.choices, outputs, strict=True)):
        choice.prompt_token_ids = prompt_token_ids
        choice.token_ids = list(output.token_ids)


def wrap_stream_generator(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `completion_stream_generator`: one chunk per delta of each choice."""
    generate_from = with_result_filter(generate)

    def completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        fields = ENDPOINT.fields_to_take(self, request)
        if not fields.response:
            return generate(self, request, *args, **kwargs)
        ids = _StreamedIds(fields, request.n or 1)
        return ids.attach_to(generate_from(ids.note, self, request, *args, **kwargs))

    return completion_stream_generator


class _StreamedIds(StreamedIds):
    def __init__(self, fields: IdFields, n: int) -> None:
        super().__init__(fields)
        self._n = n

    def ids_of(self, result: Any) -> Iterable[ChoiceIds]:
        prompt_index, result = result
        for output in result.outputs:
            yield ChoiceIds(output.index + prompt_index * self._n, result.prompt_token_ids, output.token_ids)

    def prompt_holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        return choice

    def is_from_engine(self, choice: dict[str, Any]) -> bool:
        return True

    def empty_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}


SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingCompletion.create_completion", ENDPOINT.name),
    Wrap("OpenAIServingCompletion.create_completion", ("request",), ENDPOINT.wrap),
    Wrap(
        "OpenAIServingCompletion.request_output_to_completion_response",
        ("final_res_batch", "request"),
        wrap_build_response,
    ),
    Wrap(
        "OpenAIServingCompletion.completion_stream_generator",
        ("request", "result_generator"),
        wrap_stream_generator,
    ),
)
