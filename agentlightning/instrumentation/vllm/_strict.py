"""`AGL_INSTRUMENT=strict`: a server that cannot be patched whole does not start; and what no patch can reach.

Judged when the arguments of a server have been read, before a model is loaded, and once more before it serves: the
one says what `vllm serve` would do, the other also sees servers that are started in other ways.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from agentlightning import settings
from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm.capture import session
from agentlightning.patching import Patch, Wrap

__all__ = ["app_patches", "argument_patches", "judge_grpc", "limits", "refuse", "server_patches"]

logger = logging.getLogger("agentlightning")

RECORDED_BY_ENGINE = "the engine core records what it generates, for the rollout that X-Request-Id names"

Failures = Callable[[], Sequence[str]]


def argument_patches(failures: Failures) -> tuple[Patch, ...]:
    """The patch of vLLM's `validate_parsed_serve_args`, which every way to start a server from a command line calls.

    Args:
        failures: imports what there is to patch, and says of each patch set that failed which and why.
    """

    def judged(validate: Callable[..., Any]) -> Callable[..., Any]:
        def validate_and_judge(args: Any, *others: Any, **options: Any) -> Any:
            answer = validate(args, *others, **options)
            if not getattr(args, "headless", False):  # Nothing is answered there.
                _judge_arguments(args, failures)
            return answer

        return validate_and_judge

    return (Wrap("validate_parsed_serve_args", ("args",), judged),)


def app_patches(failures: Failures) -> tuple[Patch, ...]:
    """The patch of vLLM's `build_app`, for programs that neither read arguments as vLLM does nor serve as it does."""

    def judged(build_app: Callable[..., Any]) -> Callable[..., Any]:
        def judge_and_build_app(args: Any, *others: Any, **options: Any) -> Any:
            if settings.instrument() == "strict":
                refuse(failures())
            return build_app(args, *others, **options)

        return judge_and_build_app

    return (Wrap("build_app", ("args",), judged),)


def server_patches(failures: Failures) -> tuple[Patch, ...]:
    """The patch of vLLM's `serve_http`, the last thing before a server serves."""

    def judged(serve_http: Callable[..., Any]) -> Callable[..., Any]:
        async def judge_and_serve_http(app: Any, *args: Any, **kwargs: Any) -> Any:
            limited = limits(app)
            if settings.instrument() == "strict":
                refuse([*limited, *failures()])
            for limit in limited:
                logger.warning("agentlightning: %s", limit)
            return await serve_http(app, *args, **kwargs)

        return judge_and_serve_http

    return (Wrap("serve_http", ("app",), judged),)


def judge_grpc(servicer: ModuleType) -> None:
    """Called when what serves gRPC has been imported: not all that starts it reads arguments as `vllm serve` does."""
    reason = "vLLM's gRPC server (--grpc) speaks a protocol of its own, its answers are left as they are"
    if settings.instrument() == "strict":
        refuse([reason])
    logger.warning("agentlightning: %s", reason)


def refuse(reasons: Sequence[str]) -> None:
    """End the process with one sentence and exit status 1, if there is a reason to.

    Raises:
        SystemExit: no traceback then, and what vLLM has started by now is shut down on the way out.
    """
    if reasons:
        raise SystemExit(f"agentlightning: AGL_INSTRUMENT=strict refuses this server: {'; '.join(reasons)}")


def _judge_arguments(args: Any, failures: Failures) -> None:
    past_us = _past_us(args)
    if settings.instrument() == "strict":
        refuse([*past_us, *failures()])
    for reason in past_us:
        logger.warning("agentlightning: %s", reason)


def _past_us(args: Any) -> list[str]:
    """The ways to answer that no patch of ours can reach, where `args` ask for one."""
    # As ServeSubcommand.cmd decides; where no subcommand was read (python -m ...api_server), Python answers.
    if getattr(args, "subparser", None) != "serve" or getattr(args, "grpc", False):
        return []
    if not _releases.uses_rust_frontend():
        return []
    answers = 'with token ids only where a request says "return_token_ids": true'
    records = f"; {RECORDED_BY_ENGINE}" if session.is_on() else ""
    return [f"vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND) answers without Python, {answers}{records}"]


def limits(app: Any) -> list[str]:
    """What the engine behind an app keeps from its answers, whatever is patched: a sentence each."""
    # From 0.11 vllm.engine.async_llm_engine is another name for V1's AsyncLLM, which says where it is from.
    engine = getattr(app.state, "engine_client", None)
    if type(engine).__module__.startswith("vllm.engine."):
        why = "VLLM_USE_V1=0, or what V1 of this release cannot do"
        return [f"vLLM's V0 engine answers ({why}): only chat and completions carry ids, and nothing is recorded"]
    return []
