"""What chat and completions share: vLLM is asked for its ids, or they are taken from the engine's results."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any

from agentlightning.instrumentation.vllm import long_events, releases
from agentlightning.instrumentation.vllm.answer import NOTHING, Carried, hides_reasoning, said, wanted
from agentlightning.instrumentation.vllm.containment import contained

__all__ = ["Endpoint"]


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
                return answer if carried.whole else long_events.split(answer, self.name)
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
    if said(request) is not True and not releases.hides_ids_of_reasoning() and hides_reasoning(serving, request):
        return NOTHING
    return wanted(said(request))
