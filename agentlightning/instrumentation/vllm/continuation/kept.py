"""The calls of this process that may be continued, and the counts of what became of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

from agentlightning import continuation
from agentlightning.continuation import Histories
from agentlightning.instrumentation.vllm.capture.session import session

__all__ = ["calls", "count", "forget", "is_proved", "note_proved", "report", "start"]

MOST_SHAPES = 1000

_results: Counter[str] = Counter()
_histories: Histories | None = None
_proved: set[Hashable] = set()
_metric: Any = None


def start() -> None:
    """Show the metric from the start: Prometheus sees no increase in a counter that appears with its first event."""
    global _metric
    if session.settings.continues == "off" or _metric is not None:
        return
    # vLLM's own. Not imported at the top: it decides on import whether there are several processes.
    from prometheus_client import Counter

    _metric = Counter("agentlightning_continuations", "Chat prompts, by whether they went on from ids.", ["result"])
    for result in continuation.RESULTS:
        _metric.labels(result)


def report() -> dict[str, Any] | None:
    """Return the counts for the status; None if nothing is continued."""
    if session.settings.continues == "off":
        return None
    kept = calls()
    results = {result: _results[result] for result in continuation.RESULTS}
    return {"results": results, "calls": len(kept), "bytes": kept.nbytes, "dropped": kept.dropped}


def forget() -> None:
    """Forget all calls."""
    global _histories
    _histories = None
    _proved.clear()


def calls() -> Histories:
    """Return the calls that may be continued."""
    global _histories
    if _histories is None:
        _histories = Histories(session.settings.continue_bytes)
    return _histories


def is_proved(shape: Hashable) -> bool:
    """Tell whether a template has been proved to append only behind an answer of this shape."""
    return shape in _proved


def note_proved(shape: Hashable) -> None:
    """Note that it has."""
    if len(_proved) >= MOST_SHAPES:
        _proved.clear()
    _proved.add(shape)


def count(result: str) -> None:
    """Count a request by its result."""
    _results[result] += 1
    if _metric is not None:
        _metric.labels(result).inc()
