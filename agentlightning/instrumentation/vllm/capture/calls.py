"""Facts of a request that its recording needs, whatever the endpoint: read where vLLM checks its model.

Every endpoint of vLLM hands its request to `_check_model` of one base class before it does anything else. Read there,
endpoints that nothing else of ours knows have the right names too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["PATCHES", "in_one_call"]


def in_one_call(target: str, endpoint: str) -> Patch:
    """The patch of an endpoint's `create_*` method that makes all requests to the engine those of one call.

    Args:
        target: the method, as `Wrap` takes it.
        endpoint: the path of its route, for calls that come on none, as in run-batch.
    """

    def with_a_call(create: Callable[..., Any]) -> Callable[..., Any]:
        async def create_in_a_call(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            context = _context.current() or RequestContext()
            context.endpoint = context.endpoint or endpoint
            # The endpoint that is built upon another has said it already.
            context.model = context.model or getattr(request, "model", None)
            return await _context.opened(lambda: create(serving, request, *args, **kwargs), context)

        return create_in_a_call

    return Where(lambda module: session.is_on(), Wrap(target, ("request",), with_a_call))


def noted(check: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `_check_model`."""

    async def check_model(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        context = _context.current()
        if context is not None:
            contained("reading a request", _note, context, serving, request)
        return await check(serving, request, *args, **kwargs)

    return check_model


def _note(context: RequestContext, serving: Any, request: Any) -> None:
    # An endpoint that is built upon another has said it already.
    context.model = context.model or getattr(request, "model", None) or serving.models.base_model_paths[0].name
    context.base_id = context.base_id or _base_id(context, request)
    if context.text_limit is None:
        context.text_limit = _text_limit(serving, request)


def _base_id(context: RequestContext, request: Any) -> str | None:
    """The part that the ids of an answer and of its engine requests share: the client's `X-Request-Id`, if any."""
    header = dict((context.scope or {}).get("headers", ())).get(b"x-request-id")
    return header.decode("latin-1") if header else getattr(request, "request_id", None)


def _text_limit(serving: Any, request: Any) -> int | None:
    """From how many ids on a prompt may hold others than its text stands for; None where it never does.

    vLLM keeps the whole text of a prompt that it cuts, and while it searches with beams it adds to the ids alone.
    """
    if getattr(request, "use_beam_search", False):
        return 0
    limit = getattr(request, "truncate_prompt_tokens", None)
    if limit is None and getattr(request, "truncation", None) not in (None, "disabled"):
        limit = -1
    if limit is None or limit >= 0:
        return limit
    # As many as there is room for. In some releases that is beside what may be generated, in others beside one token.
    generated = (getattr(request, name, None) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"))
    return serving.model_config.max_model_len - max(1, *(each or 0 for each in generated))


def _has_base(module: ModuleType) -> bool:
    return hasattr(module, "BaseServing")


PATCHES: tuple[Patch, ...] = (
    Where(
        lambda module: session.is_on() and _has_base(module),
        Wrap("BaseServing._check_model", ("request",), noted),
    ),
    # To 0.23.
    Where(
        lambda module: session.is_on() and not _has_base(module),
        Wrap("OpenAIServing._check_model", ("request",), noted),
    ),
)
