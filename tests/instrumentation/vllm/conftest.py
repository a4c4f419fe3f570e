"""Each test begins with settings of its own, and leaves nothing to the tests that are forked after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from agentlightning.instrumentation.vllm import _context, _isolation
from agentlightning.instrumentation.vllm.capture.session import session


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Read the settings anew, and afterwards forget failures and request: forked tests inherit this process's state."""
    session.begin()
    logger = logging.getLogger("agentlightning")
    # A logger that a program has configured stays as it is, and pytest hears it.
    logger.handlers = [logging.NullHandler()]
    yield
    logger.handlers = []
    _isolation.failures.clear()
    _context._current.set(None)
