"""A log of what does not work, which neither floods nor repeats itself."""

from __future__ import annotations

import logging
import time

__all__ = ["TroubleLog", "logger"]

logger = logging.getLogger("agentlightning")

SECONDS_BETWEEN_LOGS = 10.0


class TroubleLog:
    """Log each kind of trouble at most once every `SECONDS_BETWEEN_LOGS`, and no message twice in a row."""

    def __init__(self) -> None:
        self._silent_until: dict[str, float] = {}
        self._logged: dict[str, str] = {}

    def warn(self, kind: str, message: str) -> None:
        """Log a message, unless it is too soon, or no news."""
        now = time.monotonic()
        if message != self._logged.get(kind) and now >= self._silent_until.get(kind, 0):
            self._silent_until[kind] = now + SECONDS_BETWEEN_LOGS
            self._logged[kind] = message
            logger.warning("agentlightning: %s", message)

    def forget(self, kind: str) -> None:
        """Note that what was logged works again: if it fails once more, that is news."""
        self._logged.pop(kind, None)
