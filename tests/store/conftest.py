"""The databases that stores stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def url(new_store: Callable[[Path], str], tmp_path: Path) -> str:
    """Where a store may be made: in a file, or in a database of PostgreSQL."""
    return new_store(tmp_path / "generations.db")
