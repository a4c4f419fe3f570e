"""Reasons besides drift why rows or answers are unfit for training, and how often an attempt has each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentlightning.trajectory import SAMPLING, Call, Trajectory, sampling_of

__all__ = ["UNFIT", "count_unfit"]

UNFIT: Mapping[str, str] = {
    "mixed_sampling": "rows whose answers were sampled with different parameters",
    "greedy": "answers sampled at temperature 0, which have no distribution to correct for",
    "mixed_weights": "rows whose ids were sampled with several versions of the weights",
    "old_weights": "answers sampled with older weights than others of their attempt",
    "missing_logprobs": "answers without logprobs (record them with AGL_LOGPROBS=on)",
    "raw_logprobs": "answers whose logprobs are raw, though temperature, top_p or the like changed what was sampled",
    "other_logprobs": "answers with logits in the place of logprobs",
    "truncated": "answers that reached a limit of their length",
    "aborted": "answers that were aborted, or failed",
    "without_ids": "calls without ids, whose prompts are embeddings, or which were not recorded whole",
}
"""Reasons, in words."""


def count_unfit(calls: Sequence[Call], rows: Sequence[Trajectory]) -> dict[str, int]:
    """Count the rows and answers that each reason applies to."""
    found: Counter[str] = Counter()
    found["mixed_sampling"] = sum("mixed_sampling" in row.flags for row in rows)
    found["mixed_weights"] = sum("mixed_weights" in row.flags for row in rows)
    latest = max((each for call in calls for each in _versions(call)), default=None)
    for call in calls:
        if call.prompt_token_ids is None or call.response_token_ids is None:
            found["without_ids"] += 1
            continue
        sampling = sampling_of(call.sampling_params) or SAMPLING
        found["greedy"] += sampling["temperature"] == 0
        found["old_weights"] += latest is not None and any(each < latest for each in _versions(call))
        found["missing_logprobs"] += call.logprobs is None and bool(call.response_token_ids)
        found["raw_logprobs"] += (
            call.logprobs is not None and call.logprobs_mode == "raw_logprobs" and _shapes(sampling)
        )
        found["other_logprobs"] += call.logprobs is not None and call.logprobs_mode in (
            "raw_logits",
            "processed_logits",
        )
        found["truncated"] += call.finish_reason == "length"
        found["aborted"] += call.status != "finished"
    return dict(found)


def _versions(call: Call) -> Iterator[int]:
    for version, _, _ in call.weight_versions or ():
        if version.isascii() and version.isdigit():
            yield int(version)


def _shapes(sampling: Mapping[str, Any]) -> bool:
    """Tell whether parameters change the distribution that ids are drawn from."""
    return any((sampling[name] or None) != (usual or None) for name, usual in SAMPLING.items())
