"""Continuation: which earlier call a chat request continues, and where its prompt goes on.

Decisions about messages, rendered text and ids, and a bounded cache of the calls that may be continued. A request
continues a call if its messages are those of that call, then the call's answer, then something new. Its prompt then is
the call's exact ids, and after them what the chat template adds behind the end of the answer, provided that the
template only appends there.
"""

from __future__ import annotations

from agentlightning.continuation._calls import MOST_CANDIDATES, Call, Histories, Match, Rendered
from agentlightning.continuation._messages import (
    Answer,
    NotText,
    canonical_calls,
    fingerprints,
    is_marked,
    last_answer,
    stand_in_for,
    with_reasoning,
)
from agentlightning.continuation._results import (
    CONTINUED,
    CONTINUED_EARLIER,
    ELSEWHERE,
    FIRST_CALL,
    NO_MATCH,
    NOT_APPEND_ONLY,
    NOT_TEXT,
    OTHER_OPTIONS,
    OTHER_REQUEST,
    PARSER,
    REASONING_DROPPED,
    RESULTS,
    SEAM,
    STORE_NOT_AVAILABLE,
    TOO_LONG,
)
from agentlightning.continuation._seam import Seam, find_seam

__all__ = [
    "CONTINUED",
    "CONTINUED_EARLIER",
    "ELSEWHERE",
    "FIRST_CALL",
    "MOST_CANDIDATES",
    "NOT_APPEND_ONLY",
    "NOT_TEXT",
    "NO_MATCH",
    "OTHER_OPTIONS",
    "OTHER_REQUEST",
    "PARSER",
    "REASONING_DROPPED",
    "RESULTS",
    "SEAM",
    "STORE_NOT_AVAILABLE",
    "TOO_LONG",
    "Answer",
    "Call",
    "Histories",
    "Match",
    "NotText",
    "Rendered",
    "Seam",
    "canonical_calls",
    "find_seam",
    "fingerprints",
    "is_marked",
    "last_answer",
    "stand_in_for",
    "with_reasoning",
]
