"""Sampling parameters that the server pins (`AGL_SAMPLING`), where vLLM makes them of a request.

Every endpoint of every release makes a `SamplingParams`, which verifies itself (`_verify_args`) before it does what a
temperature of 0 implies: it forgets `top_p`, `top_k` and `min_p`, and refuses several answers. In between, the pinned
values take the place of the client's, or of the generation config's. So vLLM refuses what it would refuse without us,
and treats what is pinned as if the client had sent it. What a program makes outside of an HTTP request is left alone.

Requests of vLLM's Rust frontend, of frontends that are not instrumented, and of its gRPC server are no HTTP requests to
this package. They get the server's values when they enter the engine core, or the gRPC server's client of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._carriers import has_probe_params
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap
from agentlightning.sampling import is_same, text_of

__all__ = ["PATCHES", "PATCH_SET", "forget", "is_pinned", "pin_unseen", "report"]

PATCH_SET = "sampling"
"""The name of the set of these patches."""

_differing: Counter[str] = Counter()
"""Number of calls whose own value of a parameter was another one, by the parameter's name."""


def wrap_verify_args(verify: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `SamplingParams._verify_args`, which also runs for each copy that vLLM makes of them."""

    def verify_and_pin(self: Any) -> None:
        verify(self)
        context = _context.current()
        is_answered = context is not None and not context.is_search and (context.endpoint or "").startswith("/")
        if is_answered and session.settings.sampling.is_on:
            contained("pinning sampling parameters", _pin, self, context)

    return verify_and_pin


def _pin(params: Any, context: RequestContext) -> None:
    policy = session.settings.sampling
    pins = policy.pins if context.sampling is None else context.sampling
    asked = _others(params, pins)
    if not asked:
        return
    # A copy is the same call once more, and has what is pinned.
    _differing.update(asked.keys() - context.differing)
    context.differing = context.differing.union(asked)
    if policy.mode != "report":
        context.replaced = {**asked, **(context.replaced or {})}
        for name in asked:
            setattr(params, name, pins[name])


def is_pinned() -> bool:
    """Tell whether this server pins values for whatever names no rollout."""
    return session.settings.sampling.mode == "pin"


def pin_unseen(request: Any, parent: Any = None) -> Mapping[str, Any] | None:
    """Pin the parameters of a request to the engine that no HTTP request of this package stands behind.

    Args:
        request: vLLM's `EngineCoreRequest` or `Request`. It gets its own copy of its parameters, which may be shared.
        parent: the one that vLLM makes it of, with n > 1; from it, vLLM makes the others.

    Returns:
        What was asked for in place of what is pinned; None if nothing was.
    """
    pins = session.settings.sampling.pins
    asked = _others(request.sampling_params, pins)
    for each in (request, parent) if asked else ():
        if each is not None:
            each.sampling_params = copy(each.sampling_params)
            for name in asked:
                setattr(each.sampling_params, name, pins[name])
    return asked or None


def _others(params: Any, pins: Mapping[str, float]) -> dict[str, Any]:
    """Return a request's own values of the parameters that are pinned to others; none if it is left alone."""
    asked = {name: value for name in pins if not is_same(name, value := getattr(params, name), pins[name])}
    return {} if has_probe_params(params) or _only_scores(params) else asked


def _only_scores(params: Any) -> bool:
    """Tell whether a request wants the logprobs of given ids, or of its prompt: what it draws besides, nobody reads."""
    # From 0.22 on; a diffusion model writes two ids to read one. Up to there, and with echo, those of the prompt.
    asks_of_ids = getattr(params, "logprob_token_ids", None) is not None
    most = params.max_tokens
    return most is not None and ((asks_of_ids and most <= 2) or (params.prompt_logprobs is not None and most <= 1))


def refused_with_masks(model_config: Any) -> list[str]:
    """Return a sentence if vLLM refuses every request that has what is pinned, since it returns sampling masks."""
    if not getattr(model_config, "return_sampling_mask", False):
        return []
    policy = session.settings.sampling
    pins = policy.pins if policy.mode == "pin" else {}
    wrong = {name: value for name, value in pins.items() if name in ("temperature", "top_k") and value <= 0}
    sentence = (
        f"AGL_SAMPLING pins {text_of(wrong)}, and with --return-sampling-mask vLLM refuses every request in which "
        "temperature and top_k are not above 0"
    )
    return [sentence] if wrong else []


def report() -> dict[str, Any] | None:
    """Return what is pinned, and how many calls differed, for the status; None if this is off."""
    policy = session.settings.sampling
    if not policy.is_on:
        return None
    return {"mode": policy.mode, "pins": text_of(policy.pins), "differing": dict(_differing)}


def forget() -> None:
    """Count from zero: the patches are being removed."""
    _differing.clear()


PATCHES: tuple[Patch, ...] = (
    Where(lambda module: session.settings.sampling.is_on, Wrap("SamplingParams._verify_args", (), wrap_verify_args)),
)
