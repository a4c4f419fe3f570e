"""Call f(M) when module M has been executed.

`when_imported(name, callback)` works for modules that are imported later, again or already, in every thread, and with
every finder (files, zips, editable installs). It never fails, slows or changes the import itself.
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
    """A registration that `when_imported` returns; as a context manager, it is removed when the block ends."""

    __slots__ = ("callback", "name", "once")

    def __init__(self, name: str, callback: Callback, once: bool = False) -> None:
        self.name = name
        self.callback = callback
        self.once = once

    def remove(self) -> None:
        """Stop calling the callback; its past effects stay. Idempotent."""
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

    For a module that is imported already the callback is called at once; for one that another thread is importing, when
    that import is done. It is called again if the module is reloaded, or removed from `sys.modules` and imported again.
    It gets the module in `sys.modules`, where a module may have replaced itself. Its exceptions are logged and go no
    further, except those that end a process (`SystemExit`). The same callback is registered once per name; with `once`,
    the hook is removed after its first call.
    """
    with _lock:
        hooks = _hooks.get(name, [])
        hook = next((known for known in hooks if known.callback == callback), None)
        if hook is not None:
            return hook
        hook = ImportHook(name, callback, once)
        # A new list each time: another thread may be iterating over the old one.
        _hooks[name] = [*hooks, hook]
        # After the registration: no module that the finder waits for is missed in between.
        finder.followed, finder.execute = _hooks, execute
        if finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)
        # Then its loader calls this hook too, after executing the module.
        executing = name in _executing
    if name in sys.modules and not executing:
        _call_when_ready(hook)
    return hook


def finders_ahead() -> list[object]:
    """Return the finders before ours on `sys.meta_path`: if one of them finds a module, our hook never sees it."""
    finders: list[object] = list(sys.meta_path)
    return finders[: finders.index(finder)] if finder in finders else []


def locate(name: str) -> ModuleSpec | None:
    """Return the spec of the module called `name`, or None if there is no such module.

    `importlib.util.find_spec` would import its parent packages, and vLLM's take seconds.
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
    """Tell whether the import of `module` has not ended yet."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def execute(spec: ModuleSpec, module: ModuleType, first: Callable[[], object] = lambda: None) -> None:
    """Execute a module that the `Finder` follows, then call its hooks.

    Args:
        first: called before the module is executed; hooks that it registers are called with the others.
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
    """Return the hooks of an executed module that were not called yet.

    Once there are none, a new hook is called at its registration.
    """
    with _lock:
        hooks = [hook for hook in _hooks.get(name, ()) if hook not in called]
        if not hooks:
            _executing.discard(name)
        return hooks


def _call_when_ready(hook: ImportHook) -> None:
    """Call a hook for a module in `sys.modules`, after waiting for a thread that may still be executing the module."""
    # The import statement waits like this; import_module() would import again if the other thread's import fails.
    sys.modules["_frozen_importlib"]._lock_unlock_module(hook.name)
    module = sys.modules.get(hook.name)
    # If it is still executing, this very thread is halfway through it, by a loader that is not ours.
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
