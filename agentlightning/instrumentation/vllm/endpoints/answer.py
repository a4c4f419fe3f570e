"""Decide which ids an answer carries: vLLM's own fields, and `response_token_ids` beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._context import EngineRequest, RequestContext
from agentlightning.instrumentation.vllm.capture.session import session

__all__ = [
    "NO_IDS",
    "IdFields",
    "add_response_token_ids",
    "captured_fields",
    "hides_reasoning",
    "id_fields",
    "return_token_ids_of",
]


@dataclass(frozen=True)
class IdFields:
    """The ids that one answer carries.

    Attributes:
        response, prompt: whether it carries the ids of the response, and of the prompt.
        unsplit: whether a stream carries them in events as long as vLLM's, since the request itself has asked for ids.
    """

    response: bool
    prompt: bool
    unsplit: bool = False


ALL_IDS = IdFields(response=True, prompt=True)
NO_IDS = IdFields(response=False, prompt=False)
_BY_SETTING = {"all": ALL_IDS, "response": IdFields(response=True, prompt=False), "none": NO_IDS}


def return_token_ids_of(request: Any) -> object:
    """Return a request's own `return_token_ids`; vLLM's models keep it as an extra where it is no field (to 0.10.1)."""
    return getattr(request, "return_token_ids", None)


def id_fields(return_token_ids: object) -> IdFields:
    """Return what an answer carries: the request's own `return_token_ids` overrides `AGL_RETURN_TOKEN_IDS`.

    Anything but true and false counts as omitted: null, and values that an endpoint without such a field lets through.
    """
    if not isinstance(return_token_ids, bool):
        return _BY_SETTING[session.settings.return_token_ids]
    return replace(ALL_IDS, unsplit=True) if return_token_ids else NO_IDS


def hides_reasoning(serving: Any, request: Any) -> bool:
    """Tell whether a request keeps its reasoning out of the answer (`include_reasoning: false`).

    Response ids, decoded, are that reasoning. Without a parser vLLM cannot tell reasoning from text and shows both, as
    does a release that does not know the field.
    """
    if "include_reasoning" not in type(request).model_fields or request.include_reasoning:
        return False
    return any(getattr(serving, name, None) for name in _releases.REASONING_PARSERS)


def add_response_token_ids(answer: Any) -> None:
    """Set `response_token_ids` on an answer whose choices have their ids: one list per choice, in index order.

    If vLLM leaves out ids because it hides the text (include_reasoning=false), so does this.
    """
    token_ids = [choice.token_ids for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    if all(ids is not None for ids in token_ids):
        answer.response_token_ids = token_ids


def captured_fields(context: RequestContext | None, fields: IdFields) -> dict[str, Any]:
    """Return the fields of an answer whose endpoint knows no ids, from the engine requests made for it.

    The ids are those of the last engine request. If there were several, as in a loop of tool calls, `generations` has
    the ids of all, in order. Empty if no ids are wanted, or the engine was not asked.
    """
    if context is None or not context.engine_requests:
        return {}
    if not fields.response:
        # In a loop of tool calls, later prompts contain what was generated.
        return _prompt_field(context.engine_requests[0], fields) if len(context.engine_requests) == 1 else {}
    generations = [
        {**_prompt_field(request, fields), "token_ids": request.token_ids} for request in context.engine_requests
    ]
    last = dict(generations[-1])
    ids = last.pop("token_ids")
    found: dict[str, Any] = {**last, "response_token_ids": [ids]}
    return {**found, "generations": generations} if len(generations) > 1 else found


def _prompt_field(request: EngineRequest, fields: IdFields) -> dict[str, Any]:
    # A prompt of embeddings has no ids.
    return {"prompt_token_ids": request.prompt_token_ids} if fields.prompt and request.prompt_token_ids else {}
