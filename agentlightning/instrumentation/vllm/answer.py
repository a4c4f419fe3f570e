"""What an answer carries: vLLM's own names for ids, and `response_token_ids` beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentlightning import settings
from agentlightning.instrumentation.vllm.request_context import RequestContext

__all__ = ["NOTHING", "Carried", "add_response_token_ids", "captured_fields", "said", "wanted"]


@dataclass(frozen=True)
class Carried:
    """What one answer carries: the response ids, and the prompt ids beside them."""

    response: bool
    prompt: bool


ALL = Carried(response=True, prompt=True)
NOTHING = Carried(response=False, prompt=False)
_BY_SETTING = {"all": ALL, "response": Carried(response=True, prompt=False), "none": NOTHING}


def said(request: Any) -> object:
    """A request's own `return_token_ids`; vLLM's models keep it where they know no such field, as to 0.10.1."""
    return getattr(request, "return_token_ids", None)


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
