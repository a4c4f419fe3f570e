"""Token ids in the answers of `/v1/completions`."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints.answer import Carried, add_response_token_ids, said
from agentlightning.instrumentation.vllm.endpoints.endpoint import Endpoint, Output, StreamedIds, with_results
from agentlightning.instrumentation.vllm.endpoints.sse import edited
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]


def attach(response: Any, request: Any, carried: Carried) -> None:
    """Each of vLLM's choices has its `prompt_token_ids` and `token_ids`: add `response_token_ids` for all."""
    hidden = _choices_without_prompt_ids(request, carried)
    for choice in response.choices:
        if choice.index < hidden:
            choice.prompt_token_ids = None
        if _generates_nothing(request) and choice.token_ids is not None:
            choice.token_ids = []
    add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, carried: Carried) -> AsyncGenerator[str, None]:
    """vLLM's stream has all that it should; some of its prompt ids may be too many."""
    hidden = _choices_without_prompt_ids(request, carried)

    def drop_prompt_ids(chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            if choice["index"] < hidden and "prompt_token_ids" in choice:
                choice["prompt_token_ids"] = None

    if _generates_nothing(request):
        stream = edited(stream, "token_ids", _drop_token_ids)
    return edited(stream, "prompt_token_ids", drop_prompt_ids) if hidden else stream


def _drop_token_ids(chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        if choice.get("token_ids"):
            choice["token_ids"] = []


def _generates_nothing(request: Any) -> bool:
    # Asked for an echo alone, vLLM has the engine generate one token all the same, and leaves it out of the text.
    return request.echo and request.max_tokens == 0


def _choices_without_prompt_ids(request: Any, carried: Carried) -> float:
    """How many choices, counted from the first, are to show no prompt ids."""
    if not carried.prompt:
        return math.inf
    # Embedded prompts have no ids, vLLM gives zeros; it answers them before the others, n choices each.
    embeds = getattr(request, "prompt_embeds", None)  # from 0.10
    if embeds is None:
        return 0
    return (len(embeds) if isinstance(embeds, list) else 1) * (request.n or 1)


# echo: asked for ids, vLLM leaves the prompt's text out of an answer whose client wants it there. So it is not asked,
# and the ids are taken, as in the releases that have none or lose some.


def _asks_vllm(request: Any) -> bool:
    return _releases.gives_token_ids(type(request)) and (not request.echo or said(request) is True)


ENDPOINT = Endpoint("/v1/completions", attach, trim, asks_vllm=_asks_vllm)


def with_ids_taken(build: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `request_output_to_completion_response`: one choice for each output of each prompt."""

    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = build(self, final_res_batch, request, *args, **kwargs)
        if ENDPOINT.takes(self, request).response:
            contained(f"{ENDPOINT.name}: taking ids", _take, response, final_res_batch)
        return response

    return request_output_to_completion_response


def _take(response: Any, final_res_batch: Any) -> None:
    outputs = [(result.prompt_token_ids, output) for result in final_res_batch for output in result.outputs]
    # All of them are paired before the first is changed.
    for choice, (prompt_token_ids, output) in list(zip(response.choices, outputs, strict=True)):
        choice.prompt_token_ids = prompt_token_ids
        choice.token_ids = list(output.token_ids)


def with_streamed_ids_taken(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `completion_stream_generator`: one chunk for each delta of each choice."""
    generate_from = with_results(generate)

    def completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        carried = ENDPOINT.takes(self, request)
        if not carried.response:
            return generate(self, request, *args, **kwargs)
        ids = _StreamedIds(carried, request.n or 1)
        return ids.put_on(generate_from(ids.noted, self, request, *args, **kwargs))

    return completion_stream_generator


class _StreamedIds(StreamedIds):
    def __init__(self, carried: Carried, n: int) -> None:
        super().__init__(carried)
        self._n = n

    def outputs(self, result: Any) -> Iterable[Output]:
        prompt_index, result = result
        for output in result.outputs:
            yield Output(output.index + prompt_index * self._n, result.prompt_token_ids, output.token_ids)

    def holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        return choice

    def says_something(self, choice: dict[str, Any]) -> bool:
        return True

    def silent(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}


SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingCompletion.create_completion", ENDPOINT.name),
    Wrap("OpenAIServingCompletion.create_completion", ("request",), ENDPOINT.wrap),
    Wrap(
        "OpenAIServingCompletion.request_output_to_completion_response",
        ("final_res_batch", "request"),
        with_ids_taken,
    ),
    Wrap(
        "OpenAIServingCompletion.completion_stream_generator",
        ("request", "result_generator"),
        with_streamed_ids_taken,
    ),
)
