"""A pytest plugin: tests that share a server run in one process where pytest-xdist has several (`-n 2`).

Groups that take long begin first, so that no process is left with one of them at the end.
"""

from __future__ import annotations

import re

import pytest

SHARED = {
    "armed": "vLLM",
    "plain": "vLLM",
    "two_api_servers": "vLLM",
    "guarded": "guarded vLLM",
    "recording": "recording vLLM",
    "nursery": "recording vLLM",
    "scripted": "recording vLLM",
    "pristine": "doctor",
    "browser": "page",
}
"""The group of the tests with a fixture that is dear; all others are grouped by their file and its kind of store."""
FIRST = (
    *("vLLM", "recording vLLM", "guarded vLLM", "test_installs.py"),
    *("processes/", "recording/", "instrumentation/", "page"),
)
"""The groups, or the files, that begin first, in this order: each of them starts a vLLM, or as much besides."""


def group_of(item: pytest.Item) -> str:
    """The name of the group that a test is in."""
    fixtures = getattr(item, "fixturenames", ())
    for fixture, group in SHARED.items():
        if fixture in fixtures:
            return group
    name = item.path.relative_to(item.config.rootpath / "tests").as_posix()
    callspec = getattr(item, "callspec", None)
    kind = callspec.params.get("new_store", "") if callspec else ""
    return f"{name} {kind}".strip()


def _place(item: pytest.Item) -> tuple[int, bool]:
    group = group_of(item)
    first = next((place for place, name in enumerate(FIRST) if group.startswith(name)), len(FIRST))
    # Of the others those of one kind together: the server that several files share is started anew for another kind.
    return first, group.endswith("postgresql")


# Before pytest-xdist, which makes the group a part of the test's id.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not getattr(config.option, "loadgroup", False):
        return
    items.sort(key=_place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


_RANDOM = re.compile(r"[0-9a-fA-F]{12}")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    # Each process collects the tests by itself, and they have to have the same names in all; nobody reads a long one.
    if isinstance(val, bytes) or (isinstance(val, str) and (len(val) > 60 or _RANDOM.search(val))):
        return argname
    return None
