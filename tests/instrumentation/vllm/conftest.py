"""A test leaves nothing to those that are forked after it: neither failures that it provoked, nor a request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentlightning.instrumentation.vllm import _context, _isolation


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Forget the failures and the request of a test when it is over: forked tests inherit what this process has."""
    yield
    _isolation.failures.clear()
    _context.enter(None)
