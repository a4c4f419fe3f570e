"""Counts of recorded and lost generations, in vLLM's own `/metrics`; with several API servers, summed over all."""

from __future__ import annotations

import os
from typing import Any

from agentlightning.instrumentation.vllm._carriers import conflicting_names
from agentlightning.recorder import LOST, WRITE_SECONDS, Counters

__all__ = ["Metrics", "Observer"]


class Observer:
    """Adds to the metrics what one recorder's counters have grown by since the last call."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        metrics.observers.append(self)
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        # A forked process counts from zero, as its recorder does.
        self.seen = Counters()

    def __call__(self, counters: Counters) -> None:
        """Call this after every write."""
        before, self.seen = self.seen, counters
        self._metrics.add(before, counters)


class Metrics:
    """The metrics of this process, summed over its recorders. Make one only: Prometheus refuses a second of a name."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        # vLLM's own. Not imported at the top: it decides on import whether there are several processes.
        from prometheus_client import Counter, Gauge, Histogram

        self._generations: Any = Counter("agentlightning_generations", "Generations that the store has.")
        self._tokens: Any = Counter("agentlightning_tokens", "Token ids that the store has.", ["kind"])
        self._lost: Any = Counter(
            "agentlightning_lost_generations", "Generations that the store does not have.", ["reason"]
        )
        self._queue_bytes: Any = Gauge(
            "agentlightning_queue_bytes", "What waits in memory for the store.", multiprocess_mode="livesum"
        )
        self._conflicts: Any = Counter(
            "agentlightning_conflicting_names", "Calls that also named another rollout, by the carrier.", ["carrier"]
        )
        self._counted = conflicting_names.copy()
        self._writes: Any = Histogram(
            "agentlightning_write_seconds", "How long the store took to write a batch.", buckets=WRITE_SECONDS
        )
        # Shown from the start: Prometheus sees no increase in a counter that first appears with its first loss.
        for kind in ("prompt", "output"):
            self._tokens.labels(kind)
        for reason in LOST:
            self._lost.labels(reason)

    def add(self, before: Counters, now: Counters) -> None:
        """Add what one recorder's counters have grown by."""
        self._generations.inc(now.generations - before.generations)
        self._tokens.labels("prompt").inc(now.prompt_tokens - before.prompt_tokens)
        self._tokens.labels("output").inc(now.output_tokens - before.output_tokens)
        for reason, count in now.lost.items():
            self._lost.labels(reason).inc(count - before.lost[reason])
        found = conflicting_names.copy()
        for carrier, count in (found - self._counted).items():
            self._conflicts.labels(carrier).inc(count)
        self._counted = found
        self._queue_bytes.set(sum(observer.seen.queue_bytes for observer in self.observers))
        if sum(now.writes) > sum(before.writes):
            self._writes.observe(now.write_seconds - before.write_seconds)
