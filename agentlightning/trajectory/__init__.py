"""Trajectories, which trainers take: the calls of an attempt, merged into rows of ids with a mask.

Pure functions over calls: no store, no HTTP, no tensors. `docs/trajectories.md` explains them with a picture.

The merging rests on one fact: an answer that was sampled in the context of another call's prompt and answer has these
as the beginning of its own prompt, id by id. So a row is the prompt and the answer of its last call, and every earlier
call of the row is a range of it.
"""

from __future__ import annotations

from agentlightning.trajectory._calls import SAMPLING, AttemptCalls, Call, group_of, sampling_of, was_sampled_with
from agentlightning.trajectory._merging import merge
from agentlightning.trajectory._options import DRIFT_LIMIT, DRIFTS, Drift, MergeOptions, check_options
from agentlightning.trajectory._positions import KnownExperts, first_position, place_experts
from agentlightning.trajectory._row import FLAGS, Answer, Flag, LeftOut, Merged, Parent, Reason, Trajectory

__all__ = [
    "DRIFTS",
    "DRIFT_LIMIT",
    "FLAGS",
    "SAMPLING",
    "Answer",
    "AttemptCalls",
    "Call",
    "Drift",
    "Flag",
    "KnownExperts",
    "LeftOut",
    "MergeOptions",
    "Merged",
    "Parent",
    "Reason",
    "Trajectory",
    "check_options",
    "first_position",
    "group_of",
    "merge",
    "place_experts",
    "sampling_of",
    "was_sampled_with",
]
