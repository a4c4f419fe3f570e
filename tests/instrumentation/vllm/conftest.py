"""Failures that a test provokes are counted in that test alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentlightning.instrumentation.vllm import containment


@pytest.fixture(autouse=True)
def counted_alone() -> Iterator[None]:
    """Forget the failures of a test when it is over: tests that are forked later inherit what this process counts."""
    yield
    containment.failures.clear()
