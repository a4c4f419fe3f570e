"""Set up a server's app: the middleware that opens request contexts, and `GET /v1/agl/status`; log what is on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

import agentlightning
from agentlightning.instrumentation.vllm import _strict, continuation, sampling
from agentlightning.instrumentation.vllm._apps import add_middleware
from agentlightning.instrumentation.vllm._carriers import conflicting_names, ignored_ids, skipped_probes
from agentlightning.instrumentation.vllm._isolation import contained, failures
from agentlightning.instrumentation.vllm.capture import frontend
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, State, Status, Wrap

__all__ = ["STATUS_ROUTE", "app_patches", "server_patches"]

# Below /v1, which vLLM's own key guards, and which is all that it has guarded in every release.
STATUS_ROUTE = "/v1/agl/status"

CARRIED = {
    "all": "answers carry prompt and response ids",
    "response": "answers carry response ids",
    "none": "answers carry ids only where a request asks for them",
}
OTHER_STATES = {
    # The engine core has a process of its own, and a server has no offline engine.
    State.PENDING: "not used by this process",
    State.FAILED: "failed",
    State.NOT_FOR_THIS_RELEASE: "not for this release",
}

CONTINUES = {
    "off": "",
    "report": "; prompts that could go on from exact ids are counted",
    "on": "; prompts go on from exact ids",
}

SAMPLES = {
    "off": "",
    "report": "; sampling parameters that change the model's distribution are counted",
    "rollout": "; tokens are sampled with the parameters that a rollout names",
    "pin": "; tokens are sampled with {}",
}

logger = logging.getLogger("agentlightning")

Statuses = Callable[[], Mapping[str, Status]]


def app_patches(statuses: Statuses) -> tuple[Patch, ...]:
    """Return the patch of vLLM's `build_app`, which programs also call that serve the app themselves.

    Args:
        statuses: returns each patch set's state.
    """

    def wrap(build_app: Callable[..., Any]) -> Callable[..., Any]:
        def build_app_and_set_up(args: Any, *others: Any, **options: Any) -> Any:
            app = build_app(args, *others, **options)
            contained("setting up an app", _set_up, app, statuses)
            return app

        return build_app_and_set_up

    return (Wrap("build_app", ("args",), wrap),)


def server_patches(statuses: Statuses) -> tuple[Patch, ...]:
    """Return the patch of vLLM's `serve_http`.

    Up to 0.28, `build_app` is in a module that `python -m` runs as the main program, which no import hook sees.
    """

    def wrap(serve_http: Callable[..., Any]) -> Callable[..., Any]:
        async def set_up_and_serve_http(app: Any, *args: Any, **kwargs: Any) -> Any:
            contained("setting up an app", _set_up, app, statuses)
            contained("saying what is on", _announce, statuses)
            try:
                return await serve_http(app, *args, **kwargs)
            finally:
                # The engine has stopped, or will in a moment. vLLM tells no client that still waits: it waits itself
                # until they disconnect, or until it is killed.
                contained("recording unfinished requests", frontend.end_all)

        return set_up_and_serve_http

    return (Wrap("serve_http", ("app",), wrap),)


def _announce(statuses: Statuses) -> None:
    """Log one line for each server: what is patched, what answers carry, and where they are recorded."""
    # vLLM names the processes of one server that has several.
    if re.fullmatch(r"ApiServer_[1-9]\d*", multiprocessing.current_process().name):
        return
    import vllm

    logger.info(
        "agentlightning: release %s is on in vLLM %s; %s; %s; %s%s%s",
        *(agentlightning.__version__, getattr(vllm, "__version__", "of unknown version")),
        *(_patched(statuses()), CARRIED[session.settings.return_token_ids], session.destination()),
        _continued(statuses()),
        _sampled(statuses()),
    )


def _patched(statuses: Mapping[str, Status]) -> str:
    """Count the patch sets by their states, and name those that are not applied."""
    found: dict[State, list[str]] = {}
    for name, status in statuses.items():
        found.setdefault(status.state, []).append(name)
    others = [
        f"{len(names)} {OTHER_STATES[state]} ({', '.join(names)})"
        for state, names in found.items()
        if state is not State.APPLIED
    ]
    return ", ".join([f"{len(found.get(State.APPLIED, ()))} patch sets applied", *others])


def _continued(statuses: Mapping[str, Status]) -> str:
    mode = session.settings.continues
    chats, rendering = (statuses[name].state for name in continuation.PATCH_SETS)
    # Older releases need only the first.
    if mode != "off" and (chats is not State.APPLIED or rendering is State.FAILED):
        return "; AGL_CONTINUE has no effect here"
    return CONTINUES[mode]


def _sampled(statuses: Mapping[str, Status]) -> str:
    policy = session.settings.sampling
    if policy.is_on and statuses[sampling.PATCH_SET].state is not State.APPLIED:
        return "; AGL_SAMPLING has no effect here"
    return SAMPLES[policy.mode].format(policy)


def _set_up(app: Any, statuses: Statuses) -> None:
    if any(getattr(route, "path", None) == STATUS_ROUTE for route in app.routes):
        return
    _add_route(app, statuses)
    add_middleware(app)
    contained("counting continued calls", continuation.start)
    if session.is_recording:
        contained("opening the store", frontend.start, frontend.SECONDS_TO_REGISTER)


def _add_route(app: Any, statuses: Statuses) -> None:
    async def agl_status() -> dict[str, Any]:
        return _report(app, statuses())

    # Not in vLLM's schema: /openapi.json stays unchanged.
    app.add_api_route(STATUS_ROUTE, agl_status, methods=["GET"], include_in_schema=False, response_model=None)


def _report(app: Any, statuses: Mapping[str, Status]) -> dict[str, Any]:
    import vllm

    settings = session.settings
    return {
        "agentlightning": agentlightning.__version__,
        "vllm": getattr(vllm, "__version__", None),
        "python": platform.python_version(),
        "pid": os.getpid(),
        # Depending on the release, None and 1 both stand for one process.
        "api_servers": getattr(getattr(app.state, "args", None), "api_server_count", None) or 1,
        "switches": {
            "AGL_INSTRUMENT": settings.instrument,
            "AGL_RETURN_TOKEN_IDS": settings.return_token_ids,
            "AGL_LOGPROBS": "on" if settings.logprobs else "off",
            "AGL_RECORD_OFFLINE": "on" if settings.record_offline else "off",
            "AGL_CONTINUE": settings.continues,
            "AGL_SAMPLING": str(settings.sampling),
            "AGL_MODEL_NAMES": "any" if settings.any_model_name else "served",
        },
        "patches": {name: status.as_dict() for name, status in statuses.items()},
        "counters": {
            "failures": dict(failures),
            "ignored_ids": dict(ignored_ids),
            "conflicting_names": dict(conflicting_names),
            "skipped_probes": dict(skipped_probes),
        },
        "limits": _strict.limits(app),
        "recording": session.report(),
        "continuation": continuation.report(),
        "sampling": sampling.report(),
    }
