"""Token ids in the answers of `/v1/completions`."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from agentlightning.instrumentation.vllm import answer, releases
from agentlightning.instrumentation.vllm.answer import Carried, Endpoint, RequestField
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]


def attach(response: Any, request: Any, carried: Carried) -> None:
    """Each of vLLM's choices has its `prompt_token_ids` and `token_ids`: add `response_token_ids` for all."""
    hidden = _choices_without_prompt_ids(request, carried)
    choices = sorted(response.choices, key=lambda choice: choice.index)
    for choice in choices:
        if choice.index < hidden:
            choice.prompt_token_ids = None
    token_ids = [choice.token_ids for choice in choices]
    if all(ids is not None for ids in token_ids):
        response.response_token_ids = token_ids


def trim(stream: AsyncGenerator[str, None], request: Any, carried: Carried) -> AsyncGenerator[str, None]:
    """vLLM's stream has all that it should; some of its prompt ids may be too many."""
    hidden = _choices_without_prompt_ids(request, carried)
    if not hidden:
        return stream

    def drop_prompt_ids(chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            if choice["index"] < hidden and "prompt_token_ids" in choice:
                choice["prompt_token_ids"] = None

    return answer.edited(stream, "prompt_token_ids", drop_prompt_ids)


def _choices_without_prompt_ids(request: Any, carried: Carried) -> float:
    """How many choices, counted from the first, are to show no prompt ids."""
    if not carried.prompt:
        return math.inf
    # Embedded prompts have no ids, vLLM gives zeros; it answers them before the others, n choices each.
    embeds = request.prompt_embeds
    if embeds is None:
        return 0
    return (len(embeds) if isinstance(embeds, list) else 1) * (request.n or 1)


# echo: asked for ids, vLLM leaves the prompt's text out of an answer whose client wants it there. So it is not asked,
# and the ids are taken from the engine's outputs on their way into the answer.


def _asks(request: Any) -> bool:
    return not request.echo


def _sees_to_ids_itself(request: Any) -> bool:
    return request.echo and request.return_token_ids is None and answer.wanted(request).response


def with_ids_beside_echo(build: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `request_output_to_completion_response`: one choice for each output of each prompt."""

    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = build(self, final_res_batch, request, *args, **kwargs)
        if _sees_to_ids_itself(request):
            answer.contained(f"{ENDPOINT.name}: ids beside echo", _attach_outputs, response, final_res_batch)
        return response

    return request_output_to_completion_response


def _attach_outputs(response: Any, final_res_batch: Any) -> None:
    outputs = [(result.prompt_token_ids, output) for result in final_res_batch for output in result.outputs]
    for choice, (prompt_token_ids, output) in zip(response.choices, outputs, strict=True):
        choice.prompt_token_ids = prompt_token_ids
        choice.token_ids = list(output.token_ids)


def with_streamed_ids_beside_echo(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `completion_stream_generator`: one chunk for each delta of each choice."""
    signature = inspect.signature(generate)

    def completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not _sees_to_ids_itself(request):
            return generate(self, request, *args, **kwargs)
        # By name: its place moved behind the prompts in 0.9.2.
        call = signature.bind(self, request, *args, **kwargs)
        ids = _IdsOnTheirWay(request.n or 1, prompt_ids=answer.wanted(request).prompt)
        call.arguments["result_generator"] = ids.noted(call.arguments["result_generator"])
        return answer.edited(generate(*call.args, **call.kwargs), "choices", ids.attach)

    return completion_stream_generator


class _IdsOnTheirWay:
    """The ids that the engine has given out and no chunk has carried yet, by choice."""

    def __init__(self, n: int, prompt_ids: bool) -> None:
        self._n = n
        self._prompt_ids = prompt_ids
        self._prompt: dict[int, list[int] | None] = {}
        self._response: dict[int, list[int]] = {}

    async def noted(self, results: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[tuple[int, Any]]:
        async with aclosing(results):  # type: ignore[type-var]
            async for prompt_index, result in results:
                for output in result.outputs:
                    index = output.index + prompt_index * self._n
                    if self._prompt_ids:
                        self._prompt.setdefault(index, result.prompt_token_ids)
                    # Copied: vLLM extends a list that it has handed out when the consumer is slow.
                    self._response.setdefault(index, []).extend(output.token_ids)
                yield prompt_index, result

    def attach(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            index = choice["index"]
            # On the first chunk of a choice only, as vLLM does it.
            choice["prompt_token_ids"], self._prompt[index] = self._prompt.get(index), None
            choice["token_ids"] = self._response.pop(index, [])


ENDPOINT = Endpoint("/v1/completions", attach, trim, asks=_asks)

SERVING_PATCHES: tuple[Patch, ...] = (
    RequestField("CompletionRequest", "return_token_ids", releases.RETURN_TOKEN_IDS_SINCE),
    Wrap("OpenAIServingCompletion.create_completion", ("request",), ENDPOINT.wrap),
    Wrap(
        "OpenAIServingCompletion.request_output_to_completion_response",
        ("final_res_batch", "request"),
        with_ids_beside_echo,
    ),
    Wrap(
        "OpenAIServingCompletion.completion_stream_generator",
        ("request", "result_generator"),
        with_streamed_ids_beside_echo,
    ),
)
