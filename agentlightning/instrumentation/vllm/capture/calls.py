"""The call that an engine request belongs to: which endpoint and model it is for, and how its ids and text are made."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._carriers import read_user
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["PATCHES", "in_one_call"]


def in_one_call(target: str, endpoint: str) -> Patch:
    """Return the patch that makes all engine requests of one `create_*` call part of one HTTP request's context.

    Args:
        target: the method, as `Wrap` takes it.
        endpoint: the path of its route, for calls that come by no route, as in run-batch.
    """

    def wrap(create: Callable[..., Any]) -> Callable[..., Any]:
        async def create_in_one_call(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            context = _context.context_of(*args, *kwargs.values())
            context.endpoint = context.endpoint or endpoint
            # An endpoint that is built upon this one has set it already.
            context.model = context.model or getattr(request, "model", None)
            return await _context.run_in(context, lambda: create(serving, request, *args, **kwargs))

        return create_in_one_call

    return Where(lambda module: session.describes_calls, Wrap(target, ("request",), wrap))


def wrap_check_model(check: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_check_model` of the serving classes' base: every endpoint hands its request to it first.

    So the recording has the right names for endpoints that have no patches here, too. With `AGL_MODEL_NAMES=any`, a
    request that names a rollout, and a model that is not there, is checked again with the name of the one that is.
    """

    async def note_and_check_model(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        context = _context.current()
        if context is not None:
            contained("reading a request", _note, context, serving, request)
        error = await check(serving, request, *args, **kwargs)
        if (
            error is not None
            and context is not None
            and contained("naming the model", _rename, context, serving, request, error)
        ):
            error = await check(serving, request, *args, **kwargs)
        return error

    return note_and_check_model


def _note(context: RequestContext, serving: Any, request: Any) -> None:
    # An endpoint that is built upon this one has set them already.
    context.model = context.model or getattr(request, "model", None) or serving.models.base_model_paths[0].name
    context.base_id = context.base_id or _base_id(context, request)
    context.is_search = context.is_search or bool(getattr(request, "use_beam_search", False))
    read_user(getattr(request, "user", None), context)
    if context.text_limit is None:
        context.text_limit = _text_limit(serving, request)


def _rename(context: RequestContext, serving: Any, request: Any, error: Any) -> bool:
    """Name the server's own model in the place of an unknown one, if that is to be; tell whether it was."""
    if not (session.settings.any_model_name and context.rollout_id):
        return False
    # Up to 0.9 the fields of an error are its own.
    if getattr(error, "error", error).code != HTTPStatus.NOT_FOUND:
        return False
    request.model = context.served_model = serving.models.base_model_paths[0].name
    return True


def _base_id(context: RequestContext, request: Any) -> str | None:
    """Return the part that an answer's id and its engine requests' ids share: the client's `X-Request-Id`, if any."""
    header = dict((context.scope or {}).get("headers", ())).get(b"x-request-id")
    return header.decode("latin-1") if header else getattr(request, "request_id", None)


def _text_limit(serving: Any, request: Any) -> int | None:
    """Return the number of ids from which on a prompt's ids may not match its text; None if they always match.

    vLLM keeps the whole text of a prompt that it truncates, and beam search appends to the ids alone.
    """
    if getattr(request, "use_beam_search", False):
        return 0
    limit = getattr(request, "truncate_prompt_tokens", None)
    if limit is None and getattr(request, "truncation", None) not in (None, "disabled"):
        limit = -1
    if limit is None or limit >= 0:
        return limit
    # -1 leaves as many as fit. Some releases subtract all that may be generated, others one token.
    generated = (getattr(request, name, None) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"))
    return serving.model_config.max_model_len - max(1, *(each or 0 for each in generated))


def _has_base(module: ModuleType) -> bool:
    return hasattr(module, "BaseServing")


PATCHES: tuple[Patch, ...] = (
    Where(
        lambda module: session.describes_calls and _has_base(module),
        Wrap("BaseServing._check_model", ("request",), wrap_check_model),
    ),
    # Up to 0.23.
    Where(
        lambda module: session.describes_calls and not _has_base(module),
        Wrap("OpenAIServing._check_model", ("request",), wrap_check_model),
    ),
)
