"""What an answer carries, and how ids get on it without ever costing the client its answer.

vLLM puts token ids on chat and completions answers itself when a request says `return_token_ids`. So each endpoint's
wrapper says it where the request did not, and adds only what vLLM leaves out.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from agentlightning import settings
from agentlightning.instrumentation.vllm.request_context import RequestContext
from agentlightning.patching import Mismatch

__all__ = [
    "NOTHING",
    "Carried",
    "Endpoint",
    "RequestField",
    "add_response_token_ids",
    "as_json",
    "captured_fields",
    "contained",
    "contained_async",
    "edited",
    "failures",
    "wanted",
]

logger = logging.getLogger("agentlightning")

T = TypeVar("T")

failures: Counter[str] = Counter()
"""How often, by kind, something of ours failed and vLLM went on without it: the answer went out as vLLM made it."""


@dataclass(frozen=True)
class Carried:
    """What one answer carries: the response ids, and the prompt ids beside them."""

    response: bool
    prompt: bool


ALL = Carried(response=True, prompt=True)
NOTHING = Carried(response=False, prompt=False)
_BY_SETTING = {"all": ALL, "response": Carried(response=True, prompt=False), "none": NOTHING}


def wanted(said: object) -> Carried:
    """What an answer is to carry: the request's own `return_token_ids` wins over `AGL_RETURN_TOKEN_IDS`.

    What is neither true nor false counts as not said: null, and what an endpoint that knows no such field lets pass.
    """
    if not isinstance(said, bool):
        return _BY_SETTING[settings.return_token_ids()]
    return ALL if said else NOTHING


def add_response_token_ids(answer: Any) -> None:
    """Put `response_token_ids` on an answer whose choices have their ids: one list a choice, in index order.

    Where vLLM leaves ids out, since it must hide what was generated (include_reasoning=false), so do we.
    """
    token_ids = [choice.token_ids for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    if all(ids is not None for ids in token_ids):
        answer.response_token_ids = token_ids


def captured_fields(context: RequestContext | None, carried: Carried) -> dict[str, Any]:
    """The fields of an answer whose endpoint knows nothing of ids, from what the engine was asked for it.

    The ids are those of the last engine request; where there were several, as in a loop of tool calls, `generations`
    has those of all, in order. Empty where nothing is wanted, or the engine was not asked.
    """
    if context is None or not carried.response or not context.engine_requests:
        return {}
    generations = [
        {
            # A prompt of embeddings has none.
            **({"prompt_token_ids": request.prompt_token_ids} if carried.prompt and request.prompt_token_ids else {}),
            "token_ids": request.token_ids,
        }
        for request in context.engine_requests
    ]
    last = dict(generations[-1])
    ids = last.pop("token_ids")
    fields: dict[str, Any] = {**last, "response_token_ids": [ids]}
    return {**fields, "generations": generations} if len(generations) > 1 else fields


@dataclass(frozen=True)
class Endpoint:
    """How the answers of one endpoint get their ids.

    Args:
        name: the route, for the log.
        attach: puts on a plain answer what vLLM leaves out, and takes off what it must not carry.
        trim: the same for a stream of SSE events; the stream itself where nothing is to be taken off.
        serves: whether a serving object answers for this endpoint itself, and not for one that is built upon it.
        asks_vllm: whether vLLM may be asked for its ids; where not, another patch of the endpoint's attaches them.
    """

    name: str
    attach: Callable[[Any, Any, Carried], None]
    trim: Callable[[AsyncGenerator[str, None], Any, Carried], AsyncGenerator[str, None]]
    serves: Callable[[Any], bool] = lambda serving: True
    asks_vllm: Callable[[Any], bool] = lambda request: True

    def wrap(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """The wrapper for the `create_*` method, which gives an answer, an error or a stream."""

        async def create_with_token_ids(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            carried = contained(f"{self.name}: asking for ids", self._ask, serving, request)
            answer = await create(serving, request, *args, **kwargs)
            if carried is None or not carried.response:
                return answer
            if isinstance(answer, AsyncGenerator):
                return contained(f"{self.name}: trimming a stream", self.trim, answer, request, carried) or answer
            if hasattr(answer, "choices"):
                contained(f"{self.name}: attaching ids", self.attach, answer, request, carried)
            return answer

        return create_with_token_ids

    def _ask(self, serving: Any, request: Any) -> Carried:
        if not self.serves(serving):
            return NOTHING
        carried = wanted(request.return_token_ids)
        if carried.response and self.asks_vllm(request):
            request.return_token_ids = True
        return carried


def contained(what: str, function: Callable[..., T], *args: Any) -> T | None:
    """`function(*args)`, or None where it raises: vLLM goes on without it. Counted, and logged once a kind."""
    try:
        return function(*args)
    except Exception as error:
        _note_failure(what, error)
        return None


async def contained_async(what: str, function: Callable[..., Awaitable[T]], *args: Any) -> T | None:
    """The same for what must be awaited."""
    try:
        return await function(*args)
    except Exception as error:
        _note_failure(what, error)
        return None


def _note_failure(what: str, error: Exception) -> None:
    kind = f"{what}: {type(error).__name__}"
    failures[kind] += 1
    if failures[kind] == 1:
        logger.exception("agentlightning: %s failed, and vLLM goes on without it (said once)", what)


async def edited(
    stream: AsyncGenerator[str, None], key: str, edit: Callable[[dict[str, Any]], None]
) -> AsyncGenerator[str, None]:
    """An SSE stream of vLLM's in which `edit` has changed each chunk that holds a list under `key`.

    The others pass untouched and unread, and so does a chunk that cannot be edited. The chunks of one event stay one
    event, and closing this generator closes vLLM's.
    """
    # Not where it is null, as in every chunk of a completions stream: most chunks are never read.
    start = f'"{key}":['
    async with aclosing(stream):
        async for event in stream:
            yield (contained("editing a stream", _edit, event, edit) or event) if start in event else event


def _edit(event: str, edit: Callable[[dict[str, Any]], None]) -> str:
    chunk = json.loads(event.removeprefix("data: "))
    edit(chunk)
    return f"data: {as_json(chunk)}\n\n"


def as_json(event: dict[str, Any]) -> str:
    """As pydantic writes it, not escaped and without spaces: an event that was edited differs only where it was."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class RequestField:
    """A check without a change: a request model must have a field that the wrappers read and set.

    Args:
        model: the request model, by the name that the patched module knows it by.
        field: the field that it must have.
        since: the vLLM that it came with.
        otherwise: what to raise without it: `Mismatch`, or `NotForThisRelease` where nothing is missed then.
    """

    model: str
    field: str
    since: str
    otherwise: type[Exception] = Mismatch

    def check(self, module: ModuleType) -> None:
        model = getattr(module, self.model, None)
        if model is None:
            raise Mismatch(f"{module.__name__} has no {self.model}")
        if self.field not in model.model_fields:
            raise self.otherwise(f"{self.model} knows no {self.field}, which vLLM has had since {self.since}")

    def is_applied(self, module: ModuleType) -> bool:
        return True

    def apply(self, module: ModuleType) -> Callable[[], None]:
        return lambda: None
