"""Drift: prompts that should extend what the model saw and said, and do not. Pure functions over ids."""

from __future__ import annotations

from agentlightning.drift.causes import ABOUT, CAUSES, MEANT, Cause
from agentlightning.drift.classification import Difference, classify

__all__ = ["ABOUT", "CAUSES", "MEANT", "Cause", "Difference", "classify"]
