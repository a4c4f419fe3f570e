"""Token ids in the answers of `/v1/completions`."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncGenerator, Callable
from typing import Any

from agentlightning.instrumentation.vllm import answer, releases
from agentlightning.instrumentation.vllm.answer import Carried, Endpoint, RequestField
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
    answer.add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, carried: Carried) -> AsyncGenerator[str, None]:
    """vLLM's stream has all that it should; some of its prompt ids may be too many."""
    hidden = _choices_without_prompt_ids(request, carried)

    def drop_prompt_ids(chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            if choice["index"] < hidden and "prompt_token_ids" in choice:
                choice["prompt_token_ids"] = None

    if _generates_nothing(request):
        stream = answer.edited(stream, "token_ids", _drop_token_ids)
    return answer.edited(stream, "prompt_token_ids", drop_prompt_ids) if hidden else stream


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
    embeds = request.prompt_embeds
    if embeds is None:
        return 0
    return (len(embeds) if isinstance(embeds, list) else 1) * (request.n or 1)


# echo: asked for ids, vLLM leaves the prompt's text out of an answer whose client wants it there. So it is not asked,
# and the ids are taken from the engine's outputs on their way into the answer.


def _asks_vllm(request: Any) -> bool:
    return not request.echo


def _echoes(request: Any) -> Carried:
    """What we attach to the answer to `request` beside its echo; nothing where it has none, or vLLM was asked."""
    if request.echo and request.return_token_ids is None:
        return answer.wanted(request.return_token_ids)
    return answer.NOTHING


def with_ids_beside_echo(build: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `request_output_to_completion_response`: one choice for each output of each prompt."""

    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = build(self, final_res_batch, request, *args, **kwargs)
        answer.contained(f"{ENDPOINT.name}: ids beside echo", _attach_outputs, response, final_res_batch, request)
        return response

    return request_output_to_completion_response


def _attach_outputs(response: Any, final_res_batch: Any, request: Any) -> None:
    if not _echoes(request).response:
        return
    outputs = [(result.prompt_token_ids, output) for result in final_res_batch for output in result.outputs]
    # All of them are paired before the first is changed.
    for choice, (prompt_token_ids, output) in list(zip(response.choices, outputs, strict=True)):
        choice.prompt_token_ids = prompt_token_ids
        choice.token_ids = list(output.token_ids)


def with_streamed_ids_beside_echo(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `completion_stream_generator`: one chunk for each delta of each choice."""
    signature = inspect.signature(generate)

    def completion_stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        def with_ids() -> AsyncGenerator[str, None] | None:
            carried = _echoes(request)
            if not carried.response:
                return None
            # By name: its place moved behind the prompts in 0.9.2.
            call = signature.bind(self, request, *args, **kwargs)
            ids = _IdsOnTheirWay(request.n or 1, prompt_ids=carried.prompt)
            call.arguments["result_generator"] = ids.noted(call.arguments["result_generator"])
            return answer.edited(generate(*call.args, **call.kwargs), "choices", ids.attach)

        stream = answer.contained(f"{ENDPOINT.name}: streaming ids beside echo", with_ids)
        return generate(self, request, *args, **kwargs) if stream is None else stream

    return completion_stream_generator


class _IdsOnTheirWay:
    """The ids that the engine has given out and no chunk has carried yet, by choice."""

    def __init__(self, n: int, prompt_ids: bool) -> None:
        self._n = n
        self._prompt_ids = prompt_ids
        self._prompt: dict[int, list[int] | None] = {}
        self._response: dict[int, list[int]] = {}
        self._complete = True

    async def noted(self, results: AsyncGenerator[tuple[int, Any], None]) -> AsyncGenerator[tuple[int, Any], None]:
        """The engine's results as they are, each noted as it passes; closing this closes them."""
        try:
            async for prompt_index, result in results:
                # After one that cannot be read no ids at all: better none than some.
                self._complete = self._complete and bool(
                    answer.contained("noting streamed ids", self._note, prompt_index, result)
                )
                yield prompt_index, result
        finally:
            if hasattr(results, "aclose"):
                await results.aclose()

    def _note(self, prompt_index: int, result: Any) -> bool:
        for output in result.outputs:
            index = output.index + prompt_index * self._n
            if self._prompt_ids:
                self._prompt.setdefault(index, result.prompt_token_ids)
            # Copied: vLLM extends a list that it has handed out when the consumer is slow.
            self._response.setdefault(index, []).extend(output.token_ids)
        return True

    def attach(self, chunk: dict[str, Any]) -> None:
        """Put on one chunk what has been noted for its choices since their last one."""
        if not self._complete:
            return
        for choice in chunk["choices"]:
            index = choice["index"]
            # On the first chunk of a choice only, as vLLM does it.
            choice["prompt_token_ids"], self._prompt[index] = self._prompt.get(index), None
            choice["token_ids"] = self._response.pop(index, [])


ENDPOINT = Endpoint("/v1/completions", attach, trim, asks_vllm=_asks_vllm)

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
