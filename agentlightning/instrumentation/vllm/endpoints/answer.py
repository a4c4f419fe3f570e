"""What an answer carries: vLLM's own names for ids, and `response_token_ids` beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from agentlightning import settings
from agentlightning.instrumentation.vllm._context import EngineRequest, RequestContext

__all__ = ["NOTHING", "Carried", "add_response_token_ids", "captured_fields", "hides_reasoning", "said", "wanted"]


@dataclass(frozen=True)
class Carried:
    """The ids that one answer carries: those of the response, and of the prompt beside them.

    Attributes:
        response, prompt: whether it carries these.
        whole: whether a stream carries them as vLLM sends them, however many they are: the request itself has asked.
    """

    response: bool
    prompt: bool
    whole: bool = False


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
    return replace(ALL, whole=True) if said else NOTHING


def hides_reasoning(serving: Any, request: Any) -> bool:
    """Whether a request keeps its reasoning out of the answer (`include_reasoning: false`).

    Response ids, decoded, are that reasoning. Without a parser vLLM cannot tell reasoning from text and shows both, and
    a release that does not know the field shows both too.
    """
    if "include_reasoning" not in type(request).model_fields or request.include_reasoning:
        return False
    return any(getattr(serving, name, None) for name in _PARSERS)


# What a serving object has if a parser was configured, by release. gpt-oss is parsed without one being configured.
_PARSERS = ("parser_cls", "parser", "reasoning_parser_cls", "reasoning_parser", "use_harmony")


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
    if context is None or not context.engine_requests:
        return {}
    if not carried.response:
        # In a loop of tool calls, what was generated is in the prompts that follow.
        return _prompt_of(context.engine_requests[0], carried) if len(context.engine_requests) == 1 else {}
    generations = [
        {**_prompt_of(request, carried), "token_ids": request.token_ids} for request in context.engine_requests
    ]
    last = dict(generations[-1])
    ids = last.pop("token_ids")
    fields: dict[str, Any] = {**last, "response_token_ids": [ids]}
    return {**fields, "generations": generations} if len(generations) > 1 else fields


def _prompt_of(request: EngineRequest, carried: Carried) -> dict[str, Any]:
    # A prompt of embeddings has no ids.
    return {"prompt_token_ids": request.prompt_token_ids} if carried.prompt and request.prompt_token_ids else {}
