"""Where a module is, found without importing anything of its package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

__all__ = ["locate"]


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
