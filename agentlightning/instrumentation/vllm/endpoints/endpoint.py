"""Chat and completions: vLLM is asked for its ids, or they are taken from the engine's results.

Both answers are built from `result_generator`, an iterator of the engine's `RequestOutput`s. If an answer is plain, the
last one has everything; if it is streamed, each adds to those before it. That holds in every release, and for the V0
engine (to 0.10), whose requests the capture never sees.
"""

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
from agentlightning.instrumentation.vllm.endpoints.answer import (
    NO_IDS,
    IdFields,
    hides_reasoning,
    id_fields,
    return_token_ids_of,
)

__all__ = ["ChoiceIds", "Endpoint", "StreamedIds", "with_result_filter"]

Stream = AsyncGenerator[str, None]
ResultFilter = Callable[[AsyncIterator[Any]], AsyncIterator[Any]]


@dataclass(frozen=True)
class Endpoint:
    """An endpoint whose answers get ids.

    Args:
        name: the route, for the log.
        attach: adds to a plain answer what vLLM leaves out, and removes what it must not carry.
        trim: does the same for a stream of SSE events; returns the same stream if there is nothing to remove.
        asks_vllm: whether vLLM gives all ids on request, and otherwise the same answer; if not, they are taken.
        serves: whether a serving object answers for this endpoint itself, not for one that is built upon it.
        is_embedded: whether a request to a serving object has a prompt without ids of its own.
    """

    name: str
    attach: Callable[[Any, Any, IdFields], None]
    trim: Callable[[Stream, Any, IdFields], Stream]
    asks_vllm: Callable[[Any], bool]
    serves: Callable[[Any], bool] = lambda serving: True
    is_embedded: Callable[[Any, Any], bool] = lambda serving, request: False

    def wrap(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the `create_*` method, which returns an answer, an error or a stream."""

        async def create_with_token_ids(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            fields = contained(f"{self.name}: asking for ids", self._ask, serving, request) or NO_IDS
            answer = await create(serving, request, *args, **kwargs)
            if not fields.response:
                return answer
            if hasattr(answer, "choices"):
                contained(f"{self.name}: attaching ids", self.attach, answer, request, fields)
            elif isinstance(answer, AsyncGenerator):
                answer = contained(f"{self.name}: trimming a stream", self.trim, answer, request, fields) or answer
                return answer if fields.unsplit else sse.split_long_events(answer, self.name)
            return answer

        return create_with_token_ids

    def _ask(self, serving: Any, request: Any) -> IdFields:
        if not self.serves(serving):
            return NO_IDS
        fields = _id_fields(serving, request)
        if fields.response and self.asks_vllm(request):
            request.return_token_ids = True
        return replace(fields, prompt=False) if self.is_embedded(serving, request) else fields

    def fields_to_take(self, serving: Any, request: Any) -> IdFields:
        """Return the ids to take from the engine's results; none if that cannot be determined."""
        return contained(f"{self.name}: taking ids", self._fields_to_take, serving, request) or NO_IDS

    def _fields_to_take(self, serving: Any, request: Any) -> IdFields:
        return _id_fields(serving, request) if self.serves(serving) and not self.asks_vllm(request) else NO_IDS


def _id_fields(serving: Any, request: Any) -> IdFields:
    """Decide what an answer carries: by default nothing if a vLLM that would show the ids hides reasoning."""
    own = return_token_ids_of(request)
    if own is not True and not _releases.hides_ids_of_reasoning() and hides_reasoning(serving, request):
        return NO_IDS
    return id_fields(own)


def with_result_filter(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return `build` with one more parameter in front: a `ResultFilter` that its `result_generator` passes through."""
    signature = inspect.signature(build)

    def build_with_filter(result_filter: ResultFilter, *args: Any, **kwargs: Any) -> Any:
        # By name: in completions its position moved behind the prompts in 0.9.2.
        call = signature.bind(*args, **kwargs)
        call.arguments["result_generator"] = result_filter(call.arguments["result_generator"])
        return build(*call.args, **call.kwargs)

    return build_with_filter


class ChoiceIds(NamedTuple):
    """The ids that a choice, known by its index, got with one result."""

    choice: int
    prompt_token_ids: Iterable[int] | None
    token_ids: Iterable[int]


class StreamedIds(ABC):
    """The ids of one stream that the engine has produced and no chunk has carried yet, by choice.

    Args:
        fields: the ids that the stream carries.
    """

    def __init__(self, fields: IdFields) -> None:
        self._fields = fields
        self._prompt: dict[int, list[int] | None] = {}
        self._response: dict[int, list[int]] = {}
        self._complete = True

    @abstractmethod
    def ids_of(self, result: Any) -> Iterable[ChoiceIds]:
        """Return the ids in one item of the `result_generator`."""

    @abstractmethod
    def prompt_holder(self, chunk: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        """Return the one of the two that carries the prompt ids."""

    @abstractmethod
    def is_from_engine(self, choice: dict[str, Any]) -> bool:
        """Tell whether the engine has produced this choice of a chunk, so that it can carry ids."""

    @abstractmethod
    def empty_choice(self, index: int) -> dict[str, Any]:
        """Return a choice of a chunk that adds nothing."""

    async def note(self, results: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Yield the engine's results unchanged and note the ids of each; closing this closes them."""
        try:
            async for result in results:
                # No ids after a result that cannot be read: better none than some.
                self._complete = self._complete and bool(contained("noting streamed ids", self._note, result))
                yield result
        finally:
            # vLLM accepts any iterator; only generators can be closed.
            if isinstance(results, AsyncGenerator):
                await results.aclose()

    def _note(self, result: Any) -> bool:
        for index, prompt, response in self.ids_of(result):
            if self._fields.prompt and prompt is not None and index not in self._prompt:
                self._prompt[index] = list(prompt)
            # Copied: vLLM extends a list that it has handed out when the consumer is slow.
            self._response.setdefault(index, []).extend(response)
        return True

    async def attach_to(self, stream: Stream) -> Stream:
        """Yield the stream that is built of the results, each id on the next chunk of its choice; closing closes it."""
        last = None
        async with aclosing(stream):
            async for event in stream:
                if sse.has_list(event, "choices") and '"choices":[]' not in event:
                    last = event
                    event = contained("putting ids on a stream", sse.edit_event, event, self._attach) or event
                elif last is not None:
                    # An event with usage, an error or the end of the stream: no choice follows it.
                    for rest in contained("ending a stream", self._remaining_chunks, last) or ():
                        yield rest
                yield event

    def _attach(self, chunk: dict[str, Any]) -> None:
        """Put on one chunk what has been noted for its choices since their last chunk."""
        if not self._complete:
            return
        for choice in chunk["choices"]:
            index = choice["index"]
            holder = self.prompt_holder(chunk, choice)
            # Only on the first chunk of a choice, as vLLM does.
            prompt, self._prompt[index] = self._prompt.get(index), None
            if prompt is not None or "prompt_token_ids" in holder:
                holder["prompt_token_ids"] = prompt
            if self.is_from_engine(choice):
                choice["token_ids"] = self._response.pop(index, [])

    def _remaining_chunks(self, last: str) -> list[str]:
        """Return chunks like `last` for ids that no chunk has carried, as when a parser was silent to the end."""
        left = {index: ids for index, ids in self._response.items() if ids} if self._complete else {}
        self._response.clear()
        like = {key: value for key, value in sse.parse(last).items() if key in ("id", "object", "created", "model")}
        chunks = ({**like, "choices": [{**self.empty_choice(index), "token_ids": ids}]} for index, ids in left.items())
        return [sse.event_of(chunk) for chunk in chunks]
