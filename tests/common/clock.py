"""A host whose clock is wrong: libfaketime, of Debian's package `faketime`, changes the time of day of a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

LIBRARIES = Path("/usr/lib")
MISSING = "libfaketime is not installed here: apt-get install faketime"


def an_hour_ahead() -> Mapping[str, str]:
    """The environment of such a process."""
    return _with_clock("+1h")


def standing_still(moment: str) -> Mapping[str, str]:
    """The environment of a process for which it is always the same moment, `2026-11-25 10:00:00` in UTC for one."""
    return {**_with_clock(moment), "TZ": "UTC"}


def _with_clock(says: str) -> Mapping[str, str]:
    found = sorted(LIBRARIES.glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip(MISSING)
    # What is waited for is measured by another clock, which nobody sets.
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": says, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
