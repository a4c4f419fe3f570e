"""Drift: prompts that should extend what the model saw and said, and do not. Pure functions over ids."""

from __future__ import annotations

from agentlightning.drift._alignment import align, differing
from agentlightning.drift._attempt import analyse
from agentlightning.drift._causes import ABOUT, CAUSES, MEANT, About, Cause
from agentlightning.drift._classification import Difference, classify
from agentlightning.drift._content import cut_thoughts
from agentlightning.drift._records import AttemptDrift, Break, CallDetails, Token
from agentlightning.drift._report import Report
from agentlightning.drift._unfit import UNFIT

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
    "cut_thoughts",
    "differing",
]
