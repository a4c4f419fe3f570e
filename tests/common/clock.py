"""A host whose clock is wrong: libfaketime, of Debian's package `faketime`, changes the time of day of a process."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.common.debian import FAKETIME


def an_hour_ahead() -> Mapping[str, str]:
    """The environment of such a process."""
    return _with_clock("+1h")


def an_hour_behind() -> Mapping[str, str]:
    """The environment of such a process."""
    return _with_clock("-1h")


def standing_still(moment: str) -> Mapping[str, str]:
    """The environment of a process for which it is always the same moment, `2026-11-25 10:00:00` in UTC for one."""
    return {**_with_clock(moment), "TZ": "UTC"}


def _with_clock(says: str) -> Mapping[str, str]:
    found = FAKETIME.find()
    if found is None:
        pytest.skip(FAKETIME.missing)
    # What is waited for is measured by another clock, which nobody sets.
    return {"LD_PRELOAD": str(found), "FAKETIME": says, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
