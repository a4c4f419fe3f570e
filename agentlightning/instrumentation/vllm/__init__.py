"""Token ids in vLLM's answers: which of vLLM's modules is patched by what, and the switches around it.

Importing this never imports vLLM.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agentlightning import settings
from agentlightning.importhook import ImportHook, finders_ahead, is_executing, locate, when_imported
from agentlightning.instrumentation.vllm import (
    batch,
    chat,
    completions,
    engine_core,
    generate,
    marks,
    messages,
    model_check,
    output_processor,
    releases,
    responses,
    running,
    server,
    shutdown,
    strict,
)
from agentlightning.patching import Patch, PatchSet, State, Status

if TYPE_CHECKING:
    ChatCompletionResponsePatched: type[Any]

__all__ = [
    "ChatCompletionResponsePatched",
    "arm_vllm",
    "import_targets",
    "instrument_vllm",
    "status",
    "uninstrument_vllm",
]

logger = logging.getLogger("agentlightning")


def _patch_set(name: str, home: releases.Home, *patches: Patch) -> PatchSet:
    return PatchSet(name, home.modules, patches, since=home.since)


# The lambdas: what reports on this table is itself in it.
JUDGE = _patch_set("start-up check", releases.SERVE_ARGUMENTS, *strict.argument_patches(lambda: _failures()))
PATCH_SETS = (
    _patch_set("capture", releases.OUTPUT_PROCESSOR, *output_processor.CAPTURE_PATCHES),
    _patch_set("engine client", releases.ENGINE_CLIENT, *output_processor.CLIENT_PATCHES),
    _patch_set("engine core", releases.ENGINE_CORE, *engine_core.CORE_PATCHES),
    _patch_set("scheduler", releases.SCHEDULER, *engine_core.SCHEDULER_PATCHES),
    _patch_set("engine messages", releases.ENGINE_MESSAGES, *marks.MESSAGE_PATCHES, *engine_core.MESSAGE_PATCHES),
    _patch_set("model check", releases.SERVING_BASE, *model_check.PATCHES),
    _patch_set("chat response", releases.CHAT_PROTOCOL, *chat.RESPONSE_PATCHES),
    _patch_set("chat", releases.CHAT_SERVING, *chat.SERVING_PATCHES),
    _patch_set("chat batch", releases.BATCH_SERVING, *batch.SERVING_PATCHES),
    _patch_set("completions", releases.COMPLETION_SERVING, *completions.SERVING_PATCHES),
    _patch_set("responses", releases.RESPONSES_SERVING, *responses.SERVING_PATCHES),
    _patch_set("messages response", releases.MESSAGES_PROTOCOL, *messages.RESPONSE_PATCHES),
    _patch_set("messages", releases.MESSAGES_SERVING, *messages.SERVING_PATCHES),
    _patch_set("generate", releases.GENERATE_SERVING, *generate.SERVING_PATCHES),
    _patch_set(
        "status route",
        releases.APP,
        *server.app_patches(lambda: status()),
        *strict.app_patches(lambda: _failures()),
    ),
    _patch_set(
        "server",
        releases.LAUNCHER,
        *server.server_patches(lambda: status()),
        *strict.server_patches(lambda: _failures()),
    ),
    _patch_set("shutdown", releases.API_SERVER_MANAGER, *shutdown.API_SERVER_PATCHES),
    _patch_set("engine shutdown", releases.ENGINE_CORE_MANAGER, *shutdown.ENGINE_CORE_PATCHES),
    JUDGE,
)

_armed = _declined = False
_hooks: list[ImportHook] = []
_lock = threading.RLock()


def instrument_vllm() -> None:
    """Patch vLLM's serving modules, each when vLLM imports it, or now where it has been imported already.

    Every answer then carries its token ids, as `AGL_RETURN_TOKEN_IDS` says. Raises nothing: `status()` tells what
    became of it. A second call is a no-op with a warning.
    """
    global _declined
    _declined = False
    if not _arm():
        logger.warning("agentlightning: vLLM is instrumented already")


def arm_vllm() -> None:
    """As `instrument_vllm`, where nobody has called that or `uninstrument_vllm` yet: a program has the last word."""
    if not _declined:
        _arm()


def _arm() -> bool:
    global _armed
    with _lock:
        if _armed:
            return False
        _armed = True
    # A library that vLLM brings along (model_hosting_container_standards) lets nothing below an error through the root.
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
    # Not under the lock: registering waits for a thread that is importing the module, which may be about to arm too.
    for patch_set in PATCH_SETS:
        for module in patch_set.modules:
            _hooks.append(when_imported(module, functools.partial(_apply, patch_set)))
    for module in releases.GRPC:
        _hooks.append(when_imported(module, strict.judge_grpc))
    # Last, so that what is imported already has been patched, and is not looked for.
    _hooks.append(when_imported("vllm", _look_for_modules))
    if not _armed:
        uninstrument_vllm()  # Asked for in another thread meanwhile, which could not yet remove all of this.
    return True


def uninstrument_vllm() -> None:
    """Take every patch off again, in this process, and patch no vLLM that it imports later; idempotent.

    Requests under way are answered as they began; of a server that records, those are not recorded, and the log says
    how many. `instrument_vllm` patches again.
    """
    global _armed, _declined
    _declined = True
    with _lock:
        while _hooks:
            _hooks.pop().remove()
        for patch_set in PATCH_SETS:
            patch_set.undo()
        running.forget_all()
        _armed = False


def status() -> dict[str, Status]:
    """Each patch set's state by name; `pending` until vLLM imports the module that it patches."""
    return {patch_set.name: _status(patch_set) for patch_set in PATCH_SETS}


def _status(patch_set: PatchSet) -> Status:
    status = patch_set.status
    imported = [name for name in patch_set.modules if name in sys.modules and not is_executing(sys.modules[name])]
    if _armed and imported and status.state is State.PENDING:
        ahead = ", ".join(type(finder).__qualname__ for finder in finders_ahead()) or "none"
        reason = f"{imported[0]} was imported past our import hook (finders ahead of it on sys.meta_path: {ahead})"
        return Status(State.FAILED, reason)
    return status


def _apply(patch_set: PatchSet, module: ModuleType) -> None:
    if module.__name__ == (_home(patch_set.modules) or module.__name__):
        patch_set.apply(module)
    _refuse_without_a_judge()


def _home(modules: Sequence[str]) -> str | None:
    """The newest name that a module has here: under an older one vLLM may keep a shim, for whoever imports it yet."""
    return next(filter(locate, modules), None)


def _look_for_modules(vllm: ModuleType) -> None:
    """Without this, a patch set whose module will never be seen would be pending for ever, and nobody told."""
    version = getattr(vllm, "__version__", "of unknown version")
    # Said by the process that starts the others, once.
    if releases.is_before(releases.NEWEST_KNOWN, version) and multiprocessing.parent_process() is None:
        logger.warning(
            "agentlightning: vLLM %s is newer than any that is known here (%s); it is patched by what is found in it",
            *(version, releases.NEWEST_KNOWN),
        )
    for patch_set in PATCH_SETS:
        if _home(patch_set.modules):
            continue
        if patch_set.since and releases.is_before(version, patch_set.since):
            patch_set.skip(f"came with vLLM {patch_set.since}")
        else:
            patch_set.fail(f"vLLM {version} has no {' or '.join(patch_set.modules)}")
    _refuse_without_a_judge()


def _refuse_without_a_judge() -> None:
    # Whoever asked for strict must not get a server that nobody has judged.
    if settings.instrument() == "strict" and JUDGE.status.state is State.FAILED:
        strict.refuse(_failed())


def import_targets() -> dict[str, str]:
    """Import all of vLLM that there is to patch, since vLLM may do that only when it serves.

    Returns:
        The modules that cannot be imported, and why: nothing can answer there, a package that it needs is missing.
    """
    failed = {}
    for module in dict.fromkeys(filter(None, (_home(patch_set.modules) for patch_set in PATCH_SETS))):
        try:
            importlib.import_module(module)
        except Exception as error:
            failed[module] = " ".join(repr(error).split())
    return failed


def _failures() -> list[str]:
    """What is left off of all that there is to patch."""
    import_targets()
    return _failed()


def _failed() -> list[str]:
    """What is left off of what has been imported so far."""
    return [f"{name}: {found.reason}" for name, found in status().items() if found.state is State.FAILED]


def __getattr__(name: str) -> Any:
    if name == "ChatCompletionResponsePatched":
        return _chat_completion_response()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _chat_completion_response() -> type[Any]:
    """vLLM's own `ChatCompletionResponse`, which is extended in place; imports vLLM, instrumented or not."""
    modules = releases.CHAT_PROTOCOL.modules
    return importlib.import_module(_home(modules) or modules[0]).ChatCompletionResponse
