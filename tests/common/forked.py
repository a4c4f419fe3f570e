"""A pytest plugin: a forked test ends the fixtures that it has set up itself, and none that it was forked with.

pytest-forked ends all fixtures of the session at the end of each forked test, in its process: a server that tests
share would be stopped by the first of them, and waiting for a process that is no child of one's own never ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_process = os.getpid()
_inherited: dict[object, int] = {}
"""Number of finalizers of each collection node when the test was forked."""


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _inherited.clear()
    _inherited.update((node, len(finalizers)) for node, (finalizers, _) in _stack(item).items())
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if os.getpid() != _process:
        for node, (finalizers, _) in _stack(item).items():
            # The first ones are called last.
            del finalizers[: _inherited.get(node, 0)]


def _stack(item: pytest.Item) -> dict[object, tuple[list[object], object]]:
    # As pytest-forked itself reaches for it: pytest has no public way to end some of its fixtures.
    return item.session._setupstate.stack  # type: ignore[attr-defined]
