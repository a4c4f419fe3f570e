"""Exact token ids from an unmodified vLLM.

Importing this arms the interpreter where `AGL_INSTRUMENT` asks for it: when vLLM is imported, it is patched. The `.pth`
file does that in every Python of the environment, mostly ones that never see vLLM, and a second module of ours, or one
of the standard library's, would cost each of them as much again: what can wait until vLLM is there is elsewhere, and
annotations are quoted.
"""

import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["__version__"]

__version__ = "0.1.0"

INSTRUMENT_OFF = ("", "0", "false", "off", "no")
"""The values of `AGL_INSTRUMENT`, in lower case and without outer white space, that leave everything off."""


def is_on() -> bool:
    """Whether `AGL_INSTRUMENT` is not off. Nonsense is not: it is warned of where vLLM is imported, not everywhere."""
    # Not at the top: what is there lives as long as the finder, so that the interpreter's end would have to take
    # `os`, and all that it holds, apart piece by piece.
    import os

    return os.environ.get("AGL_INSTRUMENT", "").strip().lower() not in INSTRUMENT_OFF


class Finder:
    """Goes first on `sys.meta_path`, lets others find the modules that are followed, and has `execute` execute those.

    It stays there: taken off, it would hide the finder behind it from a thread that goes through the list, and a new
    list would lose what another thread inserts into the old one. One that follows nothing is a dictionary lookup.

    Attributes:
        followed: the names of the modules.
        execute: `execute(spec, module)` is called in the place of `spec.loader.exec_module(module)`.
    """

    def __init__(self, followed: "Container[str]", execute: "Callable[[ModuleSpec, ModuleType], object]") -> None:
        self.followed = followed
        self.execute = execute
        # (thread, module) pairs that are being looked up: two finders that ask each other would never end.
        self._asking: "set[tuple[int, str]]" = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in self.followed:
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
        if spec is not None and hasattr(spec.loader, "exec_module") and type(spec.loader).__module__ != __name__:
            spec.loader = _loader(spec, self.execute)
        return spec

    def _ask_the_others(self, *wanted: "Any") -> "ModuleSpec | None":
        # Asked directly, and nothing is imported here: find_spec runs under import locks, and one more of them stops a
        # package for ever whose __init__ waits for a thread that imports a followed submodule (wrapt, newrelic). Those
        # ahead of us have declined already, or are asking us right now.
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(*wanted) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


def _loader(spec: "ModuleSpec", execute: "Callable[[ModuleSpec, ModuleType], object]") -> "Any":
    real: "Any" = spec.loader

    # Not at the top: making a class costs more than all the functions here.
    class Loader:
        """Stands in for the real loader until the module is executed, and is gone before its first line runs.

        `importlib.resources`, `inspect`, `pkgutil` and `runpy` read `__spec__.loader` and `__loader__`; a proxy left
        there breaks them (newrelic, ddtrace).
        """

        def __getattr__(self, name: str) -> "Any":
            if name == "get_code":
                spec.loader = real  # runpy: it executes the code itself, and keeps the spec as `__main__.__spec__`
            return getattr(real, name)

        def exec_module(self, module: "ModuleType") -> None:
            spec.loader = real
            if getattr(module, "__loader__", None) is self:
                module.__loader__ = real
            execute(spec, module)

    return Loader()


def _execute_vllm(spec: "Any", module: "ModuleType") -> None:
    try:
        from agentlightning._startup import execute_vllm
    except Exception as error:  # Uninstalled, or damaged, since this interpreter started.
        import logging
        import os

        message = f"agentlightning: vllm is left as it is, unpatched: {error!r}"
        if os.environ.get("AGL_INSTRUMENT", "").strip().lower() == "strict":
            raise SystemExit(message) from error
        logging.getLogger("agentlightning").error(message)
        spec.loader.exec_module(module)
    else:
        execute_vllm(spec, module)


finder = Finder({"vllm"}, _execute_vllm)
"""The one finder of this process: it waits for vLLM, and from then on follows what `importhook` is told to."""

if is_on():
    sys.meta_path.insert(0, finder)
