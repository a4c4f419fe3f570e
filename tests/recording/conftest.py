"""Each test of recording has a rollout of its own."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture
def rollout(request: pytest.FixtureRequest) -> str:
    """An id that no other test uses."""
    return f"{request.node.name} {uuid.uuid4().hex}"
