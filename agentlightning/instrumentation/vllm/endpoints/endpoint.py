"""What chat and completions share: vLLM is asked for its ids, or they are taken from the engine's results."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.answer import NOTHING, Carried, hides_reasoning, said, wanted
from agentlightning.instrumentation.vllm.endpoints.sse import as_json, edit, has_list, read

__all__ = ["Endpoint", "Output", "StreamedIds", "with_results"]


@dataclass(frozen=True)
class Endpoint:
    """How the answers of one endpoint get their ids.

    Args:
        name: the route, for the log.
        attach: puts on a plain answer what vLLM leaves out, and takes off what it must not carry.
        trim: the same for a stream of SSE events; the stream itself where nothing is to be taken off.
        asks_vllm: whether vLLM gives all ids if it is asked, and answers as before; where not, they are taken.
        serves: whether a serving object answers for this endpoint itself, and not for one that is built upon it.
        is_embedded: whether what a serving object is asked has a prompt without ids of its own.
    """

    name: str
    attach: Callable[[Any, Any, Carried], None]
    trim: Callable[[AsyncGenerator[str, None], Any, Carried], AsyncGenerator[str, None]]
    asks_vllm: Callable[[Any], bool]
    serves: Callable[[Any], bool] = lambda serving: True
    is_embedded: Callable[[Any, Any], bool] = lambda serving, request: False

    def wrap(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """The wrapper for the `create_*` method, which gives an answer, an error or a stream."""

        async def create_with_token_ids(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            carried = contained(f"{self.name}: asking for ids", self._ask, serving, request) or NOTHING
            answer = await create(serving, request, *args, **kwargs)
            if not carried.response:
                return answer
            if isinstance(answer, AsyncGenerator):
                answer = contained(f"{self.name}: trimming a stream", self.trim, answer, request, carried) or answer
                return answer if carried.whole else sse.split(answer, self.name)
            if hasattr(answer, "choices"):
                contained(f"{self.name}: attaching ids", self.attach, answer, request, carried)
            return answer

        return create_with_token_ids

    def _ask(self, serving: Any, request: Any) -> Carried:
        if not self.serves(serving):
            return NOTHING
        carried = _wanted(serving, request)
        if carried.response and self.asks_vllm(request):
            request.return_token_ids = True
        return replace(carried, prompt=False) if self.is_embedded(serving, request) else carried

    def takes(self, serving: Any, request: Any) -> Carried:
        """What of the ids is to be taken from the engine's results; nothing where that cannot be told."""
        return contained(f"{self.name}: taking ids", self._takes, serving, request) or NOTHING

    def _takes(self, serving: Any, request: Any) -> Carried:
        return _wanted(serving, request) if self.serves(serving) and not self.asks_vllm(request) else NOTHING


def _wanted(serving: Any, request: Any) -> Carried:
    """Decide what an answer carries: nothing by default where a vLLM that would show the ids hides reasoning."""
    if said(request) is not True and not _releases.hides_ids_of_reasoning() and hides_reasoning(serving, request):
        return NOTHING
    return wanted(said(request))


# Ids from the engine's results on their way into an answer: where vLLM has none for it, loses some, or is not asked.
#
# Chat and completions are built from `result_generator`, an iterator of the engine's `RequestOutput`s. Where an answer
# is plain, the last one is all of it; where it is streamed, each adds to those before it. That holds in every release,
# and for the V0 engine (to 0.10), whose requests the capture never sees.

Stream = AsyncGenerator[str, None]


PassOn = Callable[[AsyncIterator[Any]], AsyncIterator[Any]]


def with_results(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build` as a function that takes first what its `result_generator` is to be passed through: `PassOn`."""
    signature = inspect.signature(build)

    def build_from_results(pass_on: PassOn, *args: Any, **kwargs: Any) -> Any:
        # By name: its place in completions moved behind the prompts in 0.9.2.
        call = signature.bind(*args, **kwargs)
        call.arguments["result_generator"] = pass_on(call.arguments["result_generator"])
        return build(*call.args, **call.kwargs)

    return build_from_results


class Output(NamedTuple):
    """What a choice, which is known by its index, got with one result."""

    choice: int
    prompt_token_ids: Iterable[int] | None
    token_ids: Iterable[int]


class StreamedIds(ABC):
    """The ids of one stream that the engine has given out and no chunk has carried yet, by choice.

    Args:
        carried: what of them the stream is to carry.
    """

    def __init__(self, carried: Carried) -> None:
        self._carried = carried
        self._prompt: dict[int, list[int] | None] = {}
        self._response: dict[int, list[int]] = {}
        self._complete = True

    @abstractmethod
    def outputs(self, result: Any) -> Iterable[Output]:
        """What choices got with one item of the `result_generator`."""

    @abstractmethod
    def holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        """Which of the two has the prompt ids."""

    @abstractmethod
    def says_something(self, choice: dict[str, Any]) -> bool:
        """Whether this choice of a chunk comes from the engine, so that ids can ride on it."""

    @abstractmethod
    def silent(self, index: int) -> dict[str, Any]:
        """A choice of a chunk that says nothing."""

    async def noted(self, results: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """The engine's results as they are, each noted as it passes; closing this closes them."""
        try:
            async for result in results:
                # After one that cannot be read no ids at all: better none than some.
                self._complete = self._complete and bool(contained("noting streamed ids", self._note, result))
                yield result
        finally:
            # Any iterator will do for vLLM; only generators can be closed.
            if isinstance(results, AsyncGenerator):
                await results.aclose()

    def _note(self, result: Any) -> bool:
        for index, prompt, response in self.outputs(result):
            if self._carried.prompt and prompt is not None and index not in self._prompt:
                self._prompt[index] = list(prompt)
            # Copied: vLLM extends a list that it has handed out when the consumer is slow.
            self._response.setdefault(index, []).extend(response)
        return True

    async def put_on(self, stream: Stream) -> Stream:
        """The stream made of what was noted, each id on the next chunk of its choice; closing this closes it."""
        last = None
        async with aclosing(stream):
            async for event in stream:
                if has_list(event, "choices") and '"choices":[]' not in event:
                    last = event
                    event = contained("putting ids on a stream", edit, event, self._attach) or event
                elif last is not None:
                    # What counts tokens, reports an error or ends the stream: vLLM says no more of any choice.
                    for rest in contained("ending a stream", self._left, last) or ():
                        yield rest
                yield event

    def _attach(self, chunk: dict[str, Any]) -> None:
        """Put on one chunk what has been noted for its choices since their last one."""
        if not self._complete:
            return
        for choice in chunk["choices"]:
            index = choice["index"]
            holder = self.holder(chunk, choice)
            # On the first chunk of a choice only, as vLLM does it.
            prompt, self._prompt[index] = self._prompt.get(index), None
            if prompt is not None or "prompt_token_ids" in holder:
                holder["prompt_token_ids"] = prompt
            if self.says_something(choice):
                choice["token_ids"] = self._response.pop(index, [])

    def _left(self, last: str) -> list[str]:
        """Chunks like the `last` one for the ids that have found none, as where a parser was silent to the end."""
        left = {index: ids for index, ids in self._response.items() if ids} if self._complete else {}
        self._response.clear()
        like = {key: value for key, value in read(last).items() if key in ("id", "object", "created", "model")}
        chunks = ({**like, "choices": [{**self.silent(index), "token_ids": ids}]} for index, ids in left.items())
        return [f"data: {as_json(chunk)}\n\n" for chunk in chunks]
