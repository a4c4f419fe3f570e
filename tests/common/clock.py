"""A host whose clock is wrong: libfaketime, of Debian's package `faketime`, shifts the time of day of a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

LIBRARIES = Path("/usr/lib")
MISSING = "libfaketime is not installed here: apt-get install faketime"


def an_hour_ahead() -> Mapping[str, str]:
    """The environment of such a process."""
    found = sorted(LIBRARIES.glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip(MISSING)
    # What is waited for is measured by another clock, which nobody sets.
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
