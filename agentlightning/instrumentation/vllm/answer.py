"""What an answer carries, and how ids get on it without ever costing the client its answer.

vLLM puts token ids on chat and completions answers itself when a request says `return_token_ids`. So each endpoint's
wrapper says it where the request did not, and adds only what vLLM leaves out.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from agentlightning import settings
from agentlightning.patching import Mismatch

__all__ = ["Carried", "Endpoint", "RequestField", "contained", "edited", "failures", "wanted"]

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


def wanted(request: Any) -> Carried:
    """What the answer to `request` is to carry: its own `return_token_ids` wins over `AGL_RETURN_TOKEN_IDS`.

    Null counts as not said.
    """
    if request.return_token_ids is None:
        return _BY_SETTING[settings.return_token_ids()]
    return ALL if request.return_token_ids else NOTHING


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
        carried = wanted(request)
        if carried.response and self.asks_vllm(request):
            request.return_token_ids = True
        return carried


def contained(what: str, function: Callable[..., T], *args: Any) -> T | None:
    """`function(*args)`, or None where it raises: vLLM goes on without it. Counted, and logged once a kind."""
    try:
        return function(*args)
    except Exception as error:
        kind = f"{what}: {type(error).__name__}"
        failures[kind] += 1
        if failures[kind] == 1:
            logger.exception("agentlightning: %s failed, and vLLM goes on without it (said once)", what)
        return None


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
    # As pydantic writes it: not escaped, no space.
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True)
class RequestField:
    """A check without a change: a request model must have a field that the wrappers read and set."""

    model: str
    field: str
    since: str

    def check(self, module: ModuleType) -> None:
        model = getattr(module, self.model, None)
        if model is None:
            raise Mismatch(f"{module.__name__} has no {self.model}")
        if self.field not in model.model_fields:
            raise Mismatch(f"{self.model} knows no {self.field}, which vLLM has had since {self.since}")

    def is_applied(self, module: ModuleType) -> bool:
        return True

    def apply(self, module: ModuleType) -> Callable[[], None]:
        return lambda: None
