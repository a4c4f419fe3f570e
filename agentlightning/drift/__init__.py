"""Drift: prompts that should extend what the model saw and said, and do not. Pure functions over ids."""

from __future__ import annotations

from agentlightning.drift.attempt import AttemptDrift, Break, CallDetails, Token, align, analyse
from agentlightning.drift.causes import ABOUT, CAUSES, MEANT, About, Cause
from agentlightning.drift.classification import Difference, classify
from agentlightning.drift.report import UNFIT, Report

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
