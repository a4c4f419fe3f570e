"""Patches in sets: each set is checked against the code that is there, applied whole or not at all, and undoable.

A `PatchSet` holds the patches of one module. A `Patch` is anything that can check, apply and undo itself;
`Wrap`, which lays a wrapper around a method or a function, is the one that needs no other package.
"""

from __future__ import annotations

import functools
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
    """Where a patch set stands."""

    PENDING = "pending"
    APPLIED = "applied"
    FAILED = "failed"
    NOT_FOR_THIS_RELEASE = "not for this release"


@dataclass(frozen=True)
class Status:
    """A patch set's state, and the reason for it where it is neither pending nor applied."""

    state: State
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.state.value}: {self.reason}" if self.reason else self.state.value

    def as_dict(self) -> dict[str, str | None]:
        """For JSON: `{"state": ..., "reason": ...}`."""
        return {"state": self.state.value, "reason": self.reason}


class Mismatch(Exception):
    """A target is not there, or not as the patch relies on it; the message says which and how."""


class NotForThisRelease(Exception):
    """The code that is there is older than what the patch is for, or does it itself: nothing is wrong."""


class Patch(Protocol):
    """One change to one module."""

    def check(self, module: ModuleType) -> None:
        """Change nothing. Raises `Mismatch` or `NotForThisRelease` where the patch cannot be applied."""

    def is_applied(self, module: ModuleType) -> bool:
        """Whether this very patch is in place on what `module` holds now."""
        ...

    def apply(self, module: ModuleType) -> Callable[[], None]:
        """Apply, after a `check`; returns the function that undoes it, at any later time and in any order."""
        ...


class PatchSet:
    """Patches that only make sense together, all for one module; thread-safe.

    Args:
        name: what users see in the status and in warnings.
        modules: the names that the module has had over the releases; whichever is imported is patched.
        patches: checked in this order, then applied in this order.
        since: the release that the module came with, if not every release has it.
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
        """Where the set stands now."""
        return self._status

    def apply(self, module: ModuleType) -> None:
        """Check every patch against `module`, then apply all of them, or none.

        Raises nothing: the outcome is the `status`, and a set that fails is one warning. Applying twice is a
        no-op with a warning; a module that was reloaded or imported again holds other classes, and is patched again.
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

        Silently, as nothing is wrong: the release is older than what would be patched, or does it itself. The status
        says so, wherever the module is imported; the log would only where and when a server imports it.
        """
        self._status = Status(State.NOT_FOR_THIS_RELEASE, reason)

    def fail(self, reason: str) -> None:
        """Mark the set as failed, with one warning: what it patches cannot be found, or not be patched."""
        self._status = Status(State.FAILED, reason)
        logger.warning("agentlightning: %s is left as it is, unpatched: %s", self.name, reason)

    def undo(self) -> None:
        """Put back everything that `apply` changed; the set is pending again. Idempotent."""
        with self._lock:
            _run_backwards(self._undo)
            self._undo = []
            self._status = Status(State.PENDING)


def _run_backwards(undo: Sequence[Callable[[], None]]) -> None:
    for put_back in reversed(undo):
        put_back()


@dataclass(frozen=True)
class Where:
    """A patch for some releases only: where `applies(module)` is false, there is nothing to check or to apply."""

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
    """Lay `wrapper(original)` around a method, or around a function of the module.

    A method is replaced on its class, so that every name that the class goes by sees it. A function is replaced
    wherever a module of its package, or the main program, holds it by now: who imports it later gets ours.

    Args:
        target: `"Class.method"` or `"function"`, looked up in the patched module.
        parameters: the names that it must take, since the wrapper relies on them.
        wrapper: a decorator; what it returns takes and returns what the original does.
    """

    target: str
    parameters: tuple[str, ...]
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]

    def check(self, module: ModuleType) -> None:
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
        owner, name = self._owner(module)
        seam = _Seam.at(owner, name)
        return seam is not None and self.wrapper in seam.wrappers

    def apply(self, module: ModuleType) -> Callable[[], None]:
        owner, name = self._owner(module)
        seam = _Seam.at(owner, name) or _Seam(owner, name)
        return seam.add(self.wrapper)

    def _owner(self, module: ModuleType) -> tuple[type | ModuleType, str]:
        class_name, _, name = self.target.rpartition(".")
        if not class_name:
            return module, name
        owner = getattr(module, class_name, None)
        if not isinstance(owner, type):
            raise Mismatch(f"{module.__name__} has no class {class_name}")
        return owner, name


class _Seam:
    """A patched function: what was there, the wrappers around it, and the entry that stands in its place.

    The entry looks the outermost wrapper up at each call. So wrappers leave in any order, also from under a wrapper
    that somebody else has laid over ours and that still calls the entry.
    """

    def __init__(self, owner: type | ModuleType, name: str) -> None:
        self.wrappers: list[Callable[..., Any]] = []
        self._owner = owner
        self._name = name
        self._inherited = name not in vars(owner)
        self._original: Callable[..., Any] = inspect.getattr_static(owner, name)
        self._outermost = self._original
        self._entry = self._make_entry()

    @staticmethod
    def at(owner: type | ModuleType, name: str) -> _Seam | None:
        seam = getattr(vars(owner).get(name), "__agl_seam__", None)
        return seam if isinstance(seam, _Seam) else None

    def add(self, wrapper: Callable[..., Any]) -> Callable[[], None]:
        # Under somebody else's wrapper made with functools.wraps the entry is in place, and must not oust it.
        if _Seam.at(self._owner, self._name) is not self:
            self._replace(self._original, self._entry)
        self._compose([*self.wrappers, wrapper])
        return functools.partial(self._remove, wrapper)

    def _remove(self, wrapper: Callable[..., Any]) -> None:
        self._compose([other for other in self.wrappers if other is not wrapper])
        # Somebody else's wrapper may lie over ours by now: then the entry stays, and calls the original.
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

    def _make_entry(self) -> Callable[..., Any]:
        entry: Any
        if inspect.iscoroutinefunction(self._original):

            async def call_outermost_async(*args: Any, **kwargs: Any) -> Any:
                return await self._outermost(*args, **kwargs)

            entry = call_outermost_async
        else:

            def call_outermost(*args: Any, **kwargs: Any) -> Any:
                return self._outermost(*args, **kwargs)

            entry = call_outermost
        functools.update_wrapper(entry, self._original)
        entry.__agl_seam__ = self
        return entry


def _holders(function: Callable[..., Any], package: str) -> Iterator[tuple[ModuleType, str]]:
    """The modules of `package`, and the main program, that have imported `function`, each with its name for it."""
    for module_name, module in list(sys.modules.items()):
        if module_name == "__main__" or module_name.partition(".")[0] == package:
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is function:
                    yield module, name
