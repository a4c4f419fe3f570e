"""When module M has been executed, call f(M).

`when_imported(name, callback)` works for modules that are imported later, again or already, whichever finder
finds them (files, zips, editable installs), in every thread. It never fails, slows or changes the import itself.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from _agentlightning import finder

__all__ = ["ImportHook", "execute", "finders_ahead", "is_executing", "locate", "when_imported"]

Callback = Callable[[ModuleType], object]

logger = logging.getLogger("agentlightning")


class ImportHook:
    """One registration, as `when_imported` returns it; as a context manager, it ends with the block."""

    __slots__ = ("callback", "name", "once")

    def __init__(self, name: str, callback: Callback, once: bool = False) -> None:
        self.name = name
        self.callback = callback
        self.once = once

    def remove(self) -> None:
        """Call no more; what the callback has done stays. Idempotent."""
        with _lock:
            hooks = [hook for hook in _hooks.get(self.name, ()) if hook is not self]
            if hooks:
                _hooks[self.name] = hooks
            else:
                _hooks.pop(self.name, None)

    def __enter__(self) -> ImportHook:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def when_imported(name: str, callback: Callback, once: bool = False) -> ImportHook:
    """Call `callback(module)` each time the module called `name` has been executed, until the hook is removed.

    A module that is imported already is handed over at once; one that another thread is importing, when that is
    done. Reloading it, or dropping it from `sys.modules` and importing it again, calls again. The module handed
    over is the one in `sys.modules`, which a module may have replaced itself in. What the callback raises is logged
    and goes no further, but for what ends a process (`SystemExit`). The same callback for the same name is registered
    once; with `once`, the hook is removed when it has been called.
    """
    with _lock:
        hooks = _hooks.get(name, [])
        hook = next((known for known in hooks if known.callback == callback), None)
        if hook is not None:
            return hook
        hook = ImportHook(name, callback, once)
        # A new list each time: a thread that is calling the old one's hooks is not disturbed.
        _hooks[name] = [*hooks, hook]
        # Registered first: what the finder has waited for so far is not missed in between.
        finder.followed, finder.execute = _hooks, execute
        if finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)
        # Its loader calls this hook too, when the module has been executed.
        executing = name in _executing
    if name in sys.modules and not executing:
        _call_when_ready(hook)
    return hook


def finders_ahead() -> list[object]:
    """The finders that `sys.meta_path` asks before ours: a module that one of them finds by itself is never seen."""
    finders: list[object] = list(sys.meta_path)
    return finders[: finders.index(finder)] if finder in finders else []


def locate(name: str) -> ModuleSpec | None:
    """The spec of the module called `name`, or None where there is none.

    `importlib.util.find_spec` would import the packages around it, and vLLM's take seconds.
    """
    package, *rest = name.split(".")
    spec = getattr(sys.modules[package], "__spec__", None) if package in sys.modules else find_spec(package)
    for part in rest:
        path: Sequence[str] | None = spec.submodule_search_locations if spec is not None else None
        if path is None:
            return None
        package = f"{package}.{part}"
        spec = PathFinder.find_spec(package, path)
    return spec


def is_executing(module: ModuleType) -> bool:
    """Whether the import of `module` has not ended yet."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def execute(spec: ModuleSpec, module: ModuleType, first: Callable[[], object] = lambda: None) -> None:
    """What a `Finder` that follows a module has it executed by: the hooks are called when that is done.

    `first` may register hooks: they are called with the others.
    """
    loader: Any = spec.loader
    _executing.add(spec.name)
    try:
        first()
        loader.exec_module(module)
        called: list[ImportHook] = []
        while hooks := _still_to_call(spec.name, called):
            called += hooks
            for hook in hooks:
                _call(hook, sys.modules.get(spec.name, module))
    finally:
        _executing.discard(spec.name)


def _still_to_call(name: str, called: list[ImportHook]) -> list[ImportHook]:
    """The hooks of a module that has been executed, but for those called; none left, and the next is called at once."""
    with _lock:
        hooks = [hook for hook in _hooks.get(name, ()) if hook not in called]
        if not hooks:
            _executing.discard(name)
        return hooks


def _call_when_ready(hook: ImportHook) -> None:
    """Hand over a module that is in `sys.modules`, after waiting for the thread that is still executing it, if any."""
    # What the import statement waits with; import_module() would import the module once more where the other thread's
    # import fails.
    sys.modules["_frozen_importlib"]._lock_unlock_module(hook.name)
    module = sys.modules.get(hook.name)
    # Executing all the same: it is halfway through in this very thread, by a loader that we have not seen.
    if module is not None and not is_executing(module):
        _call(hook, module)


def _call(hook: ImportHook, module: ModuleType) -> None:
    try:
        hook.callback(module)
    except Exception as error:
        logger.error(
            "agentlightning: %s was imported, but %s failed and was skipped: %s",
            hook.name,
            getattr(hook.callback, "__qualname__", hook.callback),
            " ".join(repr(error).split()),
            exc_info=logger.isEnabledFor(logging.DEBUG),
        )
    finally:
        if hook.once:
            hook.remove()


_lock = threading.RLock()
_hooks: dict[str, list[ImportHook]] = {}
_executing: set[str] = set()
