"""Each test begins with settings of its own, and leaves nothing to the tests that are forked after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentlightning.instrumentation.vllm import _context, _isolation
from agentlightning.instrumentation.vllm.capture.session import session


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Read the settings anew, and afterwards forget failures and request: forked tests inherit this process's state."""
    session.begin()
    yield
    _isolation.failures.clear()
    _context.set_current(None)
