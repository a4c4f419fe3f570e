"""When module M has been executed, call f(M).

`when_imported(name, callback)` works for modules that are imported later, again or already, whichever finder
finds them (files, zips, editable installs), in every thread. It never fails, slows or changes the import itself.

Executed in every interpreter that the `.pth` file arms: it imports nothing that the interpreter has not loaded
already (`_thread` stands for `threading`), so annotations are quoted.
"""

import sys
from _thread import RLock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    Callback = Callable[[ModuleType], object]

__all__ = ["ImportHook", "finders_ahead", "is_executing", "when_imported"]


class ImportHook:
    """One registration, as `when_imported` returns it; as a context manager, it ends with the block."""

    __slots__ = ("callback", "name")

    def __init__(self, name: str, callback: "Callback") -> None:
        self.name = name
        self.callback = callback

    def remove(self) -> None:
        """Call no more; what the callback has done stays. Idempotent."""
        with _lock:
            hooks = [hook for hook in _hooks.get(self.name, ()) if hook is not self]
            if hooks:
                _hooks[self.name] = hooks
            else:
                _hooks.pop(self.name, None)
            if not _hooks and _finder in sys.meta_path:
                sys.meta_path.remove(_finder)

    def __enter__(self) -> "ImportHook":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def when_imported(name: str, callback: "Callback") -> ImportHook:
    """Call `callback(module)` each time the module called `name` has been executed, until the hook is removed.

    A module that is imported already is handed over at once; one that another thread is importing, when that is
    done. Reloading it, or dropping it from `sys.modules` and importing it again, calls again. The module handed
    over is the one in `sys.modules`, which a module may have replaced itself in. What the callback raises is logged
    and goes no further. The same callback for the same name is registered once.
    """
    with _lock:
        hooks = _hooks.get(name, [])
        hook = next((known for known in hooks if known.callback == callback), None)
        if hook is not None:
            return hook
        hook = ImportHook(name, callback)
        # A new list each time: a thread that is calling the old one's hooks is not disturbed.
        _hooks[name] = [*hooks, hook]
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        # Its loader calls this hook too, when the module has been executed.
        executing = name in _executing
    if name in sys.modules and not executing:
        _call_when_ready(hook)
    return hook


def finders_ahead() -> "list[object]":
    """The finders that `sys.meta_path` asks before ours: a module that one of them finds by itself is never seen."""
    finders = sys.meta_path
    return list(finders[: finders.index(_finder)]) if _finder in finders else []


def is_executing(module: "ModuleType") -> bool:
    """Whether the import of `module` has not ended yet."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder:
    """First on `sys.meta_path`. Lets others find the module, and swaps the loader that they name for a `_Loader`."""

    def __init__(self) -> None:
        # (thread, module) pairs that are being looked up: two finders that ask each other would never end.
        self._asking: "set[tuple[int, str]]" = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in _hooks:
            return None
        key = (get_ident(), fullname)
        if key in self._asking:
            return None
        self._asking.add(key)
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._asking.discard(key)
        # A namespace package has no loader, and a loader of the old kind has no exec_module: nothing to follow.
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        # Asked directly: importlib.util.find_spec() would take import locks here, under which a package whose
        # __init__ waits for a thread that imports a hooked submodule stops for ever (wrapt, newrelic). Those ahead
        # of us have declined already, or are asking us right now.
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Stands in for the real loader until the module is executed, and is gone before the module's first line runs.

    `importlib.resources`, `inspect`, `pkgutil` and `runpy` read `__spec__.loader` and `__loader__`; a proxy left
    there breaks them (newrelic, ddtrace).
    """

    def __init__(self, spec: "ModuleSpec") -> None:
        self._spec = spec
        self._real: "Any" = spec.loader

    def __getattr__(self, name: str) -> "Any":
        if name in ("_real", "_spec"):
            raise AttributeError(name)  # copy and pickle ask for others before these are there
        if name == "get_code":
            self._step_aside()  # runpy: it executes the code itself, and keeps the spec as `__main__.__spec__`
        return getattr(self._real, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        create_module = getattr(self._real, "create_module", None)
        return create_module(spec) if create_module is not None else None

    def exec_module(self, module: "ModuleType") -> None:
        self._step_aside()
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._real
        name = self._spec.name
        _executing.add(name)
        try:
            self._real.exec_module(module)
            called: "list[ImportHook]" = []
            while hooks := _still_to_call(name, called):
                called += hooks
                for hook in hooks:
                    _call(hook, sys.modules.get(name, module))
        finally:
            _executing.discard(name)

    def _step_aside(self) -> None:
        self._spec.loader = self._real


def _still_to_call(name: str, called: "list[ImportHook]") -> "list[ImportHook]":
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


def _call(hook: ImportHook, module: "ModuleType") -> None:
    try:
        hook.callback(module)
    except Exception as error:
        import logging

        logging.getLogger("agentlightning").error(
            "agentlightning: %s was imported, but %s failed and was skipped: %s",
            hook.name,
            getattr(hook.callback, "__qualname__", hook.callback),
            " ".join(repr(error).split()),
            exc_info=logging.getLogger("agentlightning").isEnabledFor(logging.DEBUG),
        )


_lock = RLock()
_hooks: "dict[str, list[ImportHook]]" = {}
_executing: "set[str]" = set()
_finder: "Any" = _Finder()
