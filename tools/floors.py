"""Draw the package's imports as arrows between floors, and fail if one leads upwards: `python -m tools.floors`.

The floors are those of docs/design.md. Imports for type checkers alone are left out: they are never executed.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FLOORS", "arrows", "main", "upward"]

PACKAGE = Path(__file__).parents[1] / "agentlightning"
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("doctor", "trainers"),
    ("server",),
    ("instrumentation",),
    ("recorder",),
    ("store",),
    ("drift", "triplet", "trajectory", "continuation", "rollout_records", "sender", "completeness", "token_text"),
    ("generation", "errors", "rollout_name", "common_prefix"),
    ("_startup",),
    ("importhook", "patching"),
    ("settings", "sampling"),
    ("_agentlightning", "__init__"),
)
"""Modules and folders of the package, from the top down; those of one floor may import each other."""
_FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
# Executed when vLLM is imported, long after both modules: the wait for vLLM leads up to its patches.
EXPECTED = {("_agentlightning", "_startup"), ("_startup", "instrumentation")}

Arrow = tuple[str, str]


def arrows() -> Counter[Arrow]:
    """Count the imports from one part of the package to another."""
    files = [*PACKAGE.rglob("*.py"), PACKAGE.with_name("_agentlightning.py")]
    found = Counter[Arrow]()
    for file in files:
        source = _part(file)
        for module in _imports(ast.parse(file.read_text())):
            target = _part_of(module)
            if target is not None and target != source:
                found[source, target] += 1
    return found


def upward(found: Counter[Arrow]) -> list[Arrow]:
    """Return the arrows that lead to a higher floor, but for the two that vLLM's import follows."""
    return [each for each in found if _FLOOR_OF[each[0]] > _FLOOR_OF[each[1]] and each not in EXPECTED]


def main() -> int:
    found = arrows()
    for (source, target), count in sorted(found.items(), key=lambda item: [_FLOOR_OF[part] for part in item[0]]):
        print(f"{source:16} -> {target:16} {count:4}")
    wrong = upward(found)
    for source, target in wrong:
        print(f"upwards: {source} imports {target}")
    print(f"{len(wrong)} upwards of {len(found)} arrows")
    return 1 if wrong else 0


def _part(file: Path) -> str:
    if file.parent == PACKAGE.parent:
        return file.stem
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _part_of(module: str) -> str | None:
    if module == "_agentlightning":
        return module
    package, *rest = module.split(".")
    if package != PACKAGE.name:
        return None
    return rest[0] if rest and rest[0] in _FLOOR_OF else "__init__"


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a file imports when it is executed or one of its functions is called."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from agentlightning import settings` imports a module.
            yield from (
                f"{node.module}.{each.name}" if node.module == PACKAGE.name else node.module for each in node.names
            )
        waiting += ast.iter_child_nodes(node)


if __name__ == "__main__":
    sys.exit(main())
