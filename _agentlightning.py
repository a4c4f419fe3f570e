"""Arm an interpreter: everything that the `.pth` file runs.

Importing this module inserts a finder that waits for vLLM, if `AGL_INSTRUMENT` asks for it. That happens in every
Python process of the environment, and most of them never import vLLM. So the module stands beside the package rather
than in it, imports as little as it can, and quotes its annotations: a second module, ours or the standard library's,
would cost each process as much again.
"""

import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["INSTRUMENT_OFF", "Finder", "finder", "is_on"]

INSTRUMENT_OFF = ("", "0", "false", "off", "no")
"""Values of `AGL_INSTRUMENT`, in lower case and without outer white space, that leave everything off."""


def is_on() -> bool:
    """Tell whether `AGL_INSTRUMENT` is on. An unknown value counts as on: the warning comes when vLLM is imported."""
    # Not imported at the top: a global of this module lives as long as the finder, and the interpreter would have to
    # take `os`, and all that it refers to, apart piece by piece when it exits.
    import os

    return os.environ.get("AGL_INSTRUMENT", "").strip().lower() not in INSTRUMENT_OFF


class Finder:
    """First on `sys.meta_path`: lets the other finders find the followed modules, and executes those by `execute`.

    It is never removed: removing it would hide the finder behind it from a thread that is iterating over the list, and
    a new list would lose what another thread inserts into the old one. A finder that follows nothing costs one
    dictionary lookup for each import.

    Attributes:
        followed: names of the modules to follow.
        execute: `execute(spec, module)` is called instead of `spec.loader.exec_module(module)`.
    """

    def __init__(self, followed: "Container[str]", execute: "Callable[[ModuleSpec, ModuleType], object]") -> None:
        self.followed = followed
        self.execute = execute
        # (thread, module) pairs that are being looked up: two finders that ask each other would never return.
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
        # A namespace package has no loader, and a loader of the old kind has no exec_module: neither can be followed.
        if spec is not None and hasattr(spec.loader, "exec_module") and type(spec.loader).__module__ != __name__:
            spec.loader = _loader(spec, self.execute)
        return spec

    def _ask_the_others(self, *wanted: "Any") -> "ModuleSpec | None":
        # Ask the finders directly and import nothing here: find_spec runs under import locks, and one more lock would
        # deadlock a package whose __init__ waits for a thread that imports a followed submodule (wrapt, newrelic). The
        # finders ahead of ours have declined already, or are asking ours right now.
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

    # Not made at the top: making a class costs more than all the functions here.
    class Loader:
        """Proxy of the real loader until the module is executed; removed before the module's first line runs.

        `importlib.resources`, `inspect`, `pkgutil` and `runpy` read `__spec__.loader` and `__loader__`, and a proxy
        that stays there breaks them (newrelic, ddtrace).
        """

        def __getattr__(self, name: str) -> "Any":
            if name == "get_code":
                spec.loader = real  # runpy executes the code itself, and keeps the spec as `__main__.__spec__`
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
    except Exception as error:  # The package was removed or damaged after this interpreter started.
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
"""The one finder of this process: it waits for vLLM, and follows the modules of `importhook` from then on."""

if is_on():
    sys.meta_path.insert(0, finder)
