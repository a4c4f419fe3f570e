"""Spans, and what else names a parent, as a tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["DEEPEST", "in_tree"]

DEEPEST = 12
"""How deep the style has something shown; what is below is shown as deep."""

T = TypeVar("T")


def in_tree(found: Sequence[T], name: Callable[[T], str], parent: Callable[[T], str | None]) -> Iterator[tuple[int, T]]:
    """Each with how deep it is, parents before their children, siblings in the order that they have; every one once.

    One whose parent is not among them is at the top, as is one of a circle, which has no top.
    """
    known = {name(each) for each in found}
    children: defaultdict[str | None, list[T]] = defaultdict(list)
    for each in found:
        above = parent(each)
        children[above if above in known else None].append(each)
    shown: set[int] = set()
    for root in [*children[None], *found]:
        waiting = [(0, root)]
        while waiting:
            depth, each = waiting.pop()
            if id(each) not in shown:
                shown.add(id(each))
                yield depth, each
                waiting += ((depth + 1, child) for child in reversed(children[name(each)]))
