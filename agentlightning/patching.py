"""Patches in sets: each set is checked against the code it patches, applied completely or not at all, and undoable.

A `PatchSet` holds the patches of one module. A `Patch` is anything that can check, apply and undo itself, such as
`Wrap`, which puts a wrapper around a method or a function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, Protocol

__all__ = ["Mismatch", "NotForThisRelease", "Patch", "PatchSet", "State", "Status", "Where", "Wrap"]

logger = logging.getLogger("agentlightning")


class State(Enum):
    """The state of a patch set."""

    PENDING = "pending"
    APPLIED = "applied"
    FAILED = "failed"
    NOT_FOR_THIS_RELEASE = "not for this release"


@dataclass(frozen=True)
class Status:
    """A patch set's state, and the reason for it unless it is pending or applied."""

    state: State
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.state.value}: {self.reason}" if self.reason else self.state.value

    def as_dict(self) -> dict[str, str | None]:
        """Return `{"state": ..., "reason": ...}`, for JSON."""
        return {"state": self.state.value, "reason": self.reason}


class Mismatch(Exception):
    """A target is missing, or not as the patch needs it; the message says which and how."""


class NotForThisRelease(Exception):
    """This release is older than the patched feature, or does itself what the patch is for: nothing is wrong."""


class Patch(Protocol):
    """One change to one module."""

    def check(self, module: ModuleType) -> None:
        """Raise `Mismatch` or `NotForThisRelease` if the patch cannot be applied; change nothing."""

    def is_applied(self, module: ModuleType) -> bool:
        """Tell whether this very patch is in place on the present objects of `module`."""
        ...

    def apply(self, module: ModuleType) -> Callable[[], None]:
        """Apply, after a `check`; return the function that undoes it, at any later time and in any order."""
        ...


class PatchSet:
    """Patches that only make sense together, all for one module; thread-safe.

    Args:
        name: shown in the status and in warnings.
        modules: the names that the module has had in different releases; the imported one is patched.
        patches: checked in this order, then applied in this order.
        since: the release that introduced the module, if not every release has it.
    """

    def __init__(self, name: str, modules: Sequence[str], patches: Sequence[Patch], since: str | None = None) -> None:
        self.name = name
        self.since = since
        self.modules = tuple(modules)
        self.patches = tuple(patches)
        self._undo: list[Callable[[], None]] = []
        self._status = Status(State.PENDING)
        self._lock = threading.RLock()

    @property
    def status(self) -> Status:
        """The present state."""
        return self._status

    def apply(self, module: ModuleType) -> None:
        """Check every patch against `module`, then apply all of them, or none.

        Raises nothing: the outcome is the `status`, and a set that fails logs one warning. Applying twice is a no-op
        with a warning; a module that was reloaded or imported again has other classes, and is patched again.
        """
        with self._lock:
            undo: list[Callable[[], None]] = []
            try:
                applied = self._status.state is State.APPLIED
                if applied and all(patch.is_applied(module) for patch in self.patches):
                    logger.warning("agentlightning: %s is patched already (%s)", module.__name__, self.name)
                    return
                for patch in self.patches:
                    patch.check(module)
                for patch in self.patches:
                    undo.append(patch.apply(module))
            except NotForThisRelease as reason:
                self.skip(str(reason))
            except Exception as error:
                _run_backwards(undo)
                self.fail(str(error) if isinstance(error, Mismatch) else " ".join(repr(error).split()))
            else:
                self._undo += undo
                self._status = Status(State.APPLIED)

    def skip(self, reason: str) -> None:
        """Mark the set as not for this release.

        Nothing is logged, since nothing is wrong: the release is older than the patched feature, or does itself what
        the patches are for. The status says so.
        """
        self._status = Status(State.NOT_FOR_THIS_RELEASE, reason)

    def fail(self, reason: str) -> None:
        """Mark the set as failed, and log one warning: its targets cannot be found, or cannot be patched."""
        self._status = Status(State.FAILED, reason)
        logger.warning("agentlightning: %s is not patched: %s", self.name, reason)

    def undo(self) -> None:
        """Undo everything that `apply` changed; the set is pending again. Idempotent."""
        with self._lock:
            _run_backwards(self._undo)
            self._undo = []
            self._status = Status(State.PENDING)


def _run_backwards(undo: Sequence[Callable[[], None]]) -> None:
    for put_back in reversed(undo):
        put_back()


@dataclass(frozen=True)
class Where:
    """A patch for some releases only: if `applies(module)` is false, there is nothing to check or to apply."""

    applies: Callable[[ModuleType], bool]
    patch: Patch

    def check(self, module: ModuleType) -> None:
        if self.applies(module):
            self.patch.check(module)

    def is_applied(self, module: ModuleType) -> bool:
        return not self.applies(module) or self.patch.is_applied(module)

    def apply(self, module: ModuleType) -> Callable[[], None]:
        return self.patch.apply(module) if self.applies(module) else lambda: None


@dataclass(frozen=True)
class Wrap:
    """Put `wrapper(original)` around a method, or around a function of the module.

    A method is replaced on its class, so that it applies under every name of the class. A function is replaced in its
    module, and wherever a module of its package, or the main program, has imported it.

    Args:
        target: `"Class.method"` or `"function"`, looked up in the patched module.
        parameters: names of parameters that it must have, since the wrapper relies on them.
        wrapper: a decorator; its result takes and returns what the original does.
        module: the name of the module that has the target, where it is another than the patched one.
        is_frequent: called for every token. The wrapper gets all arguments by position, defaults included, where the
            target takes them so: a call by `*args` and `**kwargs` has several times the instructions.
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
    module: str | None = None
    is_frequent: bool = False

    def check(self, module: ModuleType) -> None:
        module = self._home(module)
        owner, name = self._owner(module)
        original = inspect.getattr_static(owner, name, None)
        if original is None:
            raise Mismatch(f"{module.__name__} has no {self.target}")
        if not inspect.isfunction(original):
            kind = "method" if isinstance(owner, type) else "function"
            raise Mismatch(f"{module.__name__}.{self.target} is not a {kind} but {type(original).__name__}")
        signature = inspect.signature(original)
        missing = [parameter for parameter in self.parameters if parameter not in signature.parameters]
        if missing:
            raise Mismatch(f"{module.__name__}.{self.target}{signature} does not take {', '.join(missing)}")

    def is_applied(self, module: ModuleType) -> bool:
        owner, name = self._owner(self._home(module))
        patched = _PatchedFunction.at(owner, name)
        return patched is not None and self.wrapper in patched.wrappers

    def apply(self, module: ModuleType) -> Callable[[], None]:
        owner, name = self._owner(self._home(module))
        patched = _PatchedFunction.at(owner, name) or _PatchedFunction(owner, name, self.is_frequent)
        return patched.add(self.wrapper)

    def _home(self, module: ModuleType) -> ModuleType:
        return module if self.module is None else importlib.import_module(self.module)

    def _owner(self, module: ModuleType) -> tuple[type | ModuleType, str]:
        class_name, _, name = self.target.rpartition(".")
        if not class_name:
            return module, name
        owner = getattr(module, class_name, None)
        if not isinstance(owner, type):
            raise Mismatch(f"{module.__name__} has no class {class_name}")
        return owner, name


class _PatchedFunction:
    """A patched function: the original, the wrappers around it, and the entry that replaces it.

    The entry looks up the outermost wrapper at each call. So wrappers can be removed in any order, even if another
    package has wrapped the entry, and still calls it.
    """

    def __init__(self, owner: type | ModuleType, name: str, is_frequent: bool) -> None:
        self.wrappers: list[Callable[..., Any]] = []
        self._owner = owner
        self._name = name
        self._inherited = name not in vars(owner)
        self._original: Callable[..., Any] = inspect.getattr_static(owner, name)
        self._outermost = self._original
        self._entry = self._make_entry(is_frequent)

    @staticmethod
    def at(owner: type | ModuleType, name: str) -> _PatchedFunction | None:
        patched = getattr(vars(owner).get(name), "__agl_patched__", None)
        return patched if isinstance(patched, _PatchedFunction) else None

    def add(self, wrapper: Callable[..., Any]) -> Callable[[], None]:
        # Another package's wrapper, made by functools.wraps, has the entry's attributes and calls it: leave it there.
        if _PatchedFunction.at(self._owner, self._name) is not self:
            self._replace(self._original, self._entry)
        self._compose([*self.wrappers, wrapper])
        return functools.partial(self._remove, wrapper)

    def _remove(self, wrapper: Callable[..., Any]) -> None:
        self._compose([other for other in self.wrappers if other is not wrapper])
        # If another package has wrapped the entry meanwhile, the entry stays, and calls the original.
        if not self.wrappers and vars(self._owner).get(self._name) is self._entry:
            if self._inherited:
                delattr(self._owner, self._name)
            else:
                self._replace(self._entry, self._original)

    def _replace(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        setattr(self._owner, self._name, new)
        if isinstance(self._owner, ModuleType):
            for holder, name in _holders(old, self._owner.__name__.partition(".")[0]):
                setattr(holder, name, new)

    def _compose(self, wrappers: list[Callable[..., Any]]) -> None:
        outermost = self._original
        for wrapper in wrappers:
            outermost = functools.update_wrapper(wrapper(outermost), outermost)
        self.wrappers, self._outermost = wrappers, outermost

    def _make_entry(self, is_frequent: bool) -> Callable[..., Any]:
        entry: Any
        if inspect.iscoroutinefunction(self._original):

            async def call_outermost_async(*args: Any, **kwargs: Any) -> Any:
                return await self._outermost(*args, **kwargs)

            entry = call_outermost_async
        elif is_frequent and _takes_positions(self._original):
            entry = self._by_position()
        else:

            def call_outermost(*args: Any, **kwargs: Any) -> Any:
                return self._outermost(*args, **kwargs)

            entry = call_outermost
        functools.update_wrapper(entry, self._original)
        entry.__agl_patched__ = self
        return entry

    def _by_position(self) -> Callable[..., Any]:
        """Return an entry with the original's own parameters."""
        names = ", ".join(inspect.signature(self._original, follow_wrapped=False).parameters)
        made: dict[str, Any] = {"__agl_patched__": self}
        exec(f"def call_outermost({names}): return __agl_patched__._outermost({names})", made)
        entry = made["call_outermost"]
        entry.__defaults__ = self._original.__defaults__  # type: ignore[attr-defined]
        return entry


def _takes_positions(function: Callable[..., Any]) -> bool:
    """Tell whether all arguments of a function can be given by position, and their number has an end.

    The wrapper of another package is asked for its own parameters, not for what it wraps: defaults are its own, too.
    """
    kinds = {parameter.kind for parameter in inspect.signature(function, follow_wrapped=False).parameters.values()}
    return kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _holders(function: Callable[..., Any], package: str) -> Iterator[tuple[ModuleType, str]]:
    """Yield the modules of `package`, and the main program, that have imported `function`, and their name for it."""
    for module_name, module in list(sys.modules.items()):
        if module_name == "__main__" or module_name.partition(".")[0] == package:
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is function:
                    yield module, name
