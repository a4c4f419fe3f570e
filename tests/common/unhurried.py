"""Settings for tests with random input that pass on any machine, however slow or busy."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

__all__ = ["UNHURRIED"]

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A decorator; with more of its own, `settings(UNHURRIED, max_examples=20)`."""
