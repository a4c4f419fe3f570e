"""The table of patch sets: which of vLLM's modules is patched by what, and the state of each set in this process."""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

from agentlightning import settings
from agentlightning.importhook import ImportHook, finders_ahead, is_executing, locate, when_imported
from agentlightning.instrumentation.vllm import (
    _apps,
    _logging,
    _releases,
    _shutdown,
    _status,
    _strict,
    continuation,
    sampling,
)
from agentlightning.instrumentation.vllm.capture import calls, engine_core, frontend, in_process, marks
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.endpoints import batch, chat, completions, generate, messages, responses
from agentlightning.patching import Patch, PatchSet, State, Status

__all__ = ["PATCH_SETS", "apply_all", "home", "import_targets", "status", "undo_all"]

logger = logging.getLogger("agentlightning")


def _patch_set(name: str, home: _releases.Home, *patches: Patch) -> PatchSet:
    return PatchSet(name, home.modules, patches, since=home.since)


# Lambdas: PATCH_SETS is not defined yet, and what these patches report is the state of the table itself.
START_UP_CHECK = _patch_set(
    "start-up check", _releases.SERVE_ARGUMENTS, *_strict.argument_patches(lambda: _import_and_list_failures())
)
PATCH_SETS = (
    _patch_set("capture", _releases.OUTPUT_PROCESSOR, *frontend.CAPTURE_PATCHES),
    _patch_set(
        "engine client",
        _releases.ENGINE_CLIENT,
        *frontend.CLIENT_PATCHES,
        *in_process.CLIENT_PATCHES,
        *_strict.client_patches(),
    ),
    _patch_set(
        "offline engine",
        _releases.OFFLINE_ENGINE,
        *in_process.ENGINE_PATCHES,
        *_strict.offline_patches(lambda: _list_failures()),
    ),
    _patch_set("offline calls", _releases.OFFLINE_CALLS, *in_process.OFFLINE_PATCHES),
    _patch_set("engine core", _releases.ENGINE_CORE, *engine_core.CORE_PATCHES),
    _patch_set("scheduler", _releases.SCHEDULER, *engine_core.SCHEDULER_PATCHES),
    _patch_set("engine messages", _releases.ENGINE_MESSAGES, *marks.MESSAGE_PATCHES, *engine_core.MESSAGE_PATCHES),
    _patch_set(sampling.PATCH_SET, _releases.SAMPLING_PARAMS, *sampling.PATCHES),
    _patch_set("model check", _releases.SERVING_BASE, *calls.PATCHES),
    _patch_set("own apps", _releases.SERVING_BASE, *_apps.PATCHES),
    _patch_set(continuation.PATCH_SETS[0], _releases.CHAT_PREPARATION, *continuation.CHAT_PATCHES),
    _patch_set(continuation.PATCH_SETS[1], _releases.CHAT_RENDERING, *continuation.RENDERING_PATCHES),
    _patch_set("chat response", _releases.CHAT_PROTOCOL, *chat.RESPONSE_PATCHES),
    _patch_set("chat", _releases.CHAT_SERVING, *chat.SERVING_PATCHES),
    _patch_set("chat batch", _releases.BATCH_SERVING, *batch.SERVING_PATCHES),
    _patch_set("completions", _releases.COMPLETION_SERVING, *completions.SERVING_PATCHES),
    _patch_set("responses", _releases.RESPONSES_SERVING, *responses.SERVING_PATCHES),
    _patch_set("messages response", _releases.MESSAGES_PROTOCOL, *messages.RESPONSE_PATCHES),
    _patch_set("messages", _releases.MESSAGES_SERVING, *messages.SERVING_PATCHES),
    _patch_set("generate", _releases.GENERATE_SERVING, *generate.SERVING_PATCHES),
    _patch_set(
        "status route",
        _releases.APP,
        *_status.app_patches(lambda: status()),
        *_strict.app_patches(lambda: _import_and_list_failures()),
    ),
    _patch_set(
        "server",
        _releases.LAUNCHER,
        *_status.server_patches(lambda: status()),
        *_strict.server_patches(lambda: _import_and_list_failures()),
    ),
    _patch_set("shutdown", _releases.API_SERVER_MANAGER, *_shutdown.API_SERVER_PATCHES),
    _patch_set("engine shutdown", _releases.ENGINE_CORE_MANAGER, *_shutdown.ENGINE_CORE_PATCHES),
    START_UP_CHECK,
)

_armed = False
_hooks: list[ImportHook] = []
_lock = threading.RLock()


def apply_all() -> bool:
    """Apply each patch set when vLLM imports its module, or now if vLLM has; return False if that was done before."""
    global _armed
    with _lock:
        if _armed:
            return False
        _armed = True
        session.begin()
    _logging.log_through_vllm()
    # Not under the lock: registering waits for a thread that is importing the module, which may be about to arm too.
    for patch_set in PATCH_SETS:
        for module in patch_set.modules:
            _hooks.append(when_imported(module, functools.partial(_apply, patch_set)))
    for module in _releases.GRPC:
        _hooks.append(when_imported(module, _strict.check_grpc))
    # Last: modules that are imported already have been patched by now, and are not reported as missing.
    _hooks.append(when_imported("vllm", _report_missing_modules))
    if not _armed:
        undo_all()  # Another thread called it meanwhile, and could not remove hooks that were registered after that.
    return True


def undo_all() -> None:
    """Remove every patch and every import hook; idempotent."""
    global _armed
    with _lock:
        while _hooks:
            _hooks.pop().remove()
        for patch_set in PATCH_SETS:
            patch_set.undo()
        frontend.forget_all()
        continuation.forget()
        sampling.forget()
        _armed = False


def status() -> dict[str, Status]:
    """Return each patch set's state by name."""
    return {patch_set.name: _status_of(patch_set) for patch_set in PATCH_SETS}


def _status_of(patch_set: PatchSet) -> Status:
    status = patch_set.status
    imported = [name for name in patch_set.modules if name in sys.modules and not is_executing(sys.modules[name])]
    if _armed and imported and status.state is State.PENDING:
        ahead = ", ".join(type(finder).__qualname__ for finder in finders_ahead()) or "none"
        reason = f"{imported[0]} was imported past our import hook (finders ahead of it on sys.meta_path: {ahead})"
        return Status(State.FAILED, reason)
    return status


def _apply(patch_set: PatchSet, module: ModuleType) -> None:
    if module.__name__ == (home(patch_set.modules) or module.__name__):
        patch_set.apply(module)
    _refuse_without_start_up_check()


def home(modules: Sequence[str]) -> str | None:
    """Return the newest name that a module has in the installed vLLM, or None.

    Under an older name vLLM may keep a shim for programs that still import it.
    """
    return next(filter(locate, modules), None)


def _report_missing_modules(vllm: ModuleType) -> None:
    """Fail or skip each patch set whose module does not exist: it would stay pending for ever, without a word."""
    version = getattr(vllm, "__version__", "of unknown version")
    # Logged once, by the process that starts the others.
    if _releases.is_before(_releases.NEWEST_KNOWN, version) and multiprocessing.parent_process() is None:
        logger.warning(
            "agentlightning: vLLM %s is newer than any release known here (%s); what can be found in it is patched",
            *(version, _releases.NEWEST_KNOWN),
        )
    for patch_set in PATCH_SETS:
        if home(patch_set.modules):
            continue
        if patch_set.since and _releases.is_before(version, patch_set.since):
            patch_set.skip(f"came with vLLM {patch_set.since}")
        elif patch_set.name in continuation.PATCH_SETS and session.settings.continues == "off":
            patch_set.skip(f"vLLM {version} has no {' or '.join(patch_set.modules)}, and AGL_CONTINUE is off")
        elif patch_set.name == sampling.PATCH_SET and not session.settings.sampling.is_on:
            patch_set.skip(f"vLLM {version} has no {' or '.join(patch_set.modules)}, and AGL_SAMPLING is off")
        else:
            patch_set.fail(f"vLLM {version} has no {' or '.join(patch_set.modules)}")
    _refuse_without_start_up_check()


def _refuse_without_start_up_check() -> None:
    # Under strict, a server that nothing checks before it serves must not start.
    if settings.instrument() == "strict" and START_UP_CHECK.status.state is State.FAILED:
        _strict.refuse(_list_failures())


def import_targets() -> dict[str, str]:
    """Import every module that has patches, since vLLM may import some only when it serves.

    Returns:
        The modules that cannot be imported, each with the error: a package that it needs is missing, so that the
        endpoint does not exist in this environment.
    """
    failed = {}
    for module in dict.fromkeys(filter(None, (home(patch_set.modules) for patch_set in PATCH_SETS))):
        try:
            importlib.import_module(module)
        except Exception as error:
            failed[module] = " ".join(repr(error).split())
    return failed


def _import_and_list_failures() -> list[str]:
    import_targets()
    return _list_failures()


def _list_failures() -> list[str]:
    """Say of each patch set that failed, among the modules imported so far, why.

    `AGL_CONTINUE` asks for a set of its own, which a release that is too old does not have.
    """
    return [
        f"{name}: {found.reason}"
        for name, found in status().items()
        if found.state is State.FAILED or (found.state is State.NOT_FOR_THIS_RELEASE and _is_asked_for(name))
    ]


def _is_asked_for(name: str) -> bool:
    return name == continuation.PATCH_SETS[0] and session.settings.continues != "off"
