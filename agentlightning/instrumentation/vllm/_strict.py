"""`AGL_INSTRUMENT=strict`: refuse a server that cannot be patched completely, or cannot record as it was told to.
Also: report what no patch can change.

A server is checked when its arguments have been read, before a model is loaded, and again before it serves: the first
check knows what `vllm serve` would start, the second also covers servers that are started in other ways.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from agentlightning import settings
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.instrumentation.vllm import _releases, sampling
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap
from agentlightning.store import open_store

__all__ = [
    "app_patches",
    "argument_patches",
    "check_grpc",
    "client_patches",
    "limits",
    "offline_patches",
    "refuse",
    "server_patches",
    "unreached",
]

logger = logging.getLogger("agentlightning")

RECORDED_BY_ENGINE = "the engine core records what it generates, for the rollout that X-Request-Id names"

Failures = Callable[[], Sequence[str]]


REFUSES_INVALID = ("AGL_SAMPLING",)
"""Variables whose invalid value keeps a server from starting: it would answer in another way than it was told to."""


def argument_patches(failures: Failures) -> tuple[Patch, ...]:
    """Return the patch of `validate_parsed_serve_args`, which every way to start a server from a command line calls.

    Args:
        failures: imports everything that has patches, and returns a sentence for each patch set that failed.
    """

    def wrap(validate: Callable[..., Any]) -> Callable[..., Any]:
        def validate_and_check(args: Any, *others: Any, **options: Any) -> Any:
            answer = validate(args, *others, **options)
            if not getattr(args, "headless", False):  # A headless engine answers no client.
                _check_arguments(args, failures)
            return answer

        return validate_and_check

    return (Wrap("validate_parsed_serve_args", ("args",), wrap),)


def app_patches(failures: Failures) -> tuple[Patch, ...]:
    """Return the patch of `build_app`, for programs that neither read arguments nor serve by vLLM's own functions."""

    def wrap(build_app: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_build_app(args: Any, *others: Any, **options: Any) -> Any:
            refuse_invalid()
            if settings.instrument() == "strict":
                refuse([*_troubles_with_settings(), *failures()])
            return build_app(args, *others, **options)

        return check_and_build_app

    return (Wrap("build_app", ("args",), wrap),)


def server_patches(failures: Failures) -> tuple[Patch, ...]:
    """Return the patch of `serve_http`, the last function that runs before a server serves."""

    def wrap(serve_http: Callable[..., Any]) -> Callable[..., Any]:
        async def check_and_serve_http(app: Any, *args: Any, **kwargs: Any) -> Any:
            limited = limits(app)
            refuse_invalid()
            if settings.instrument() == "strict":
                refuse([*limited, *_troubles_with_settings(), *failures()])
            for limit in limited:
                logger.warning("agentlightning: %s", limit)
            return await serve_http(app, *args, **kwargs)

        return check_and_serve_http

    return (Wrap("serve_http", ("app",), wrap),)


def client_patches() -> tuple[Patch, ...]:
    """Return the patch of `AsyncLLM.__init__`, for `vllm run-batch`, which answers requests without a server."""

    def wrap(init: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
            refuse_invalid()
            init(self, *args, **kwargs)

        return check_and_init

    return (Where(lambda module: any(map(settings.objection, REFUSES_INVALID)), Wrap("AsyncLLM.__init__", (), wrap)),)


def offline_patches(failures: Failures) -> tuple[Patch, ...]:
    """Return the patch of `LLMEngine.__init__`, which makes the engine of an offline `LLM`.

    Args:
        failures: returns a sentence for each patch set that failed, among the modules imported so far.
    """

    def wrap(init: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
            if settings.instrument() == "strict":
                refuse([*_troubles_with_settings(), *failures()], "this LLM")
            init(self, *args, **kwargs)

        return check_and_init

    return (Where(lambda module: session.records_offline, Wrap("LLMEngine.__init__", (), wrap)),)


def check_grpc(servicer: ModuleType) -> None:
    """Refuse or report vLLM's gRPC server, when its module is imported: it may read its arguments in its own way."""
    reason = f"vLLM's gRPC server (--grpc) has its own protocol, so its answers stay unchanged{unreached()}"
    if settings.instrument() == "strict":
        refuse([reason])
    logger.warning("agentlightning: %s", reason)


def refuse(reasons: Sequence[str], what: str = "this server") -> None:
    """End the process with one sentence and exit status 1, if there are reasons to.

    Raises:
        SystemExit: so that there is no traceback, and what vLLM has started is shut down on the way out.
    """
    if reasons:
        raise SystemExit(f"agentlightning: AGL_INSTRUMENT=strict refuses {what}: {'; '.join(reasons)}")


def refuse_invalid() -> None:
    """End the process as `refuse` does, strict or not, if a variable has a value that nothing can stand for."""
    wrong = [each for each in map(settings.objection, REFUSES_INVALID) if each]
    if wrong:
        raise SystemExit(f"agentlightning: this server does not start: {'; '.join(wrong)}")


def _check_arguments(args: Any, failures: Failures) -> None:
    unpatchable = _unpatchable(args)
    refuse_invalid()
    if settings.instrument() == "strict":
        refuse([*unpatchable, *_troubles_with_settings(), *failures()])
    for reason in unpatchable:
        logger.warning("agentlightning: %s", reason)


def _troubles_with_settings() -> list[str]:
    """Return a sentence for each variable that has an invalid value, or if nothing can be recorded at `AGL_STORE`."""
    wrong = [each for each in map(settings.objection, settings.VARIABLES) if each]
    store = session.settings.store
    trouble = _trouble_with_store(store) if store else None
    return [*wrong, *([trouble] if trouble else [])]


@functools.cache
def _trouble_with_store(url: str) -> str | None:
    """Open the store as the recorder will, once in each process; say why that fails."""
    try:
        open_store(url).close()
    except (StoreRefused, StoreUnavailable) as error:
        return f"nothing can be recorded: {error}"
    return None


def _unpatchable(args: Any) -> list[str]:
    """Return a sentence if `args` ask for a frontend that no patch can reach."""
    # As ServeSubcommand.cmd decides; if no subcommand was read (python -m ...api_server), Python answers.
    if getattr(args, "subparser", None) != "serve" or getattr(args, "grpc", False):
        return []
    if not _releases.uses_rust_frontend():
        return []
    answers = 'with token ids only where a request says "return_token_ids": true'
    records = f"; {RECORDED_BY_ENGINE}" if session.is_recording else ""
    reason = f"vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND) answers without Python, {answers}{records}"
    return [f"{reason}{unreached(by_core=True)}"]


def unreached(*, by_core: bool = False) -> str:
    """Say what changes no request of a frontend that has none of our patches, or not those for HTTP.

    Args:
        by_core: only an engine core can pin, which knows whose requests they are only where it records.
    """
    policy, clauses = session.settings.sampling, list[str]()
    if sampling.is_pinned() and (session.is_recording or not by_core):
        clauses.append(f"{policy} is pinned for all, and a rollout's own parameters do not reach it")
    elif policy.is_on:
        clauses.append(f"AGL_SAMPLING={policy} does not reach it")
    if session.settings.any_model_name:
        clauses.append("AGL_MODEL_NAMES does not reach it")
    return "".join(f"; {clause}" for clause in clauses)


def limits(app: Any) -> list[str]:
    """Return a sentence for each thing that the engine behind an app keeps out of its answers, or refuses to answer."""
    engine = getattr(app.state, "engine_client", None)
    if _releases.is_v0_engine(engine):
        why = "VLLM_USE_V1=0, or what V1 of this release cannot do"
        return [f"vLLM's V0 engine answers ({why}): only chat and completions carry ids, and nothing is recorded"]
    return sampling.refused_with_masks(getattr(engine, "model_config", None))
