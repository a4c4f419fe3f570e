"""Drift: prompts that should extend what the model saw and said, and do not. Pure functions over ids."""

from __future__ import annotations

from agentlightning.drift.alignment import align
from agentlightning.drift.attempt import analyse
from agentlightning.drift.causes import ABOUT, CAUSES, MEANT, About, Cause
from agentlightning.drift.classification import Difference, classify
from agentlightning.drift.records import AttemptDrift, Break, CallDetails, Token
from agentlightning.drift.report import Report
from agentlightning.drift.unfit import UNFIT

__all__ = [
    "ABOUT",
    "CAUSES",
    "MEANT",
    "UNFIT",
    "About",
    "AttemptDrift",
    "Break",
    "CallDetails",
    "Cause",
    "Difference",
    "Report",
    "Token",
    "align",
    "analyse",
    "classify",
]
