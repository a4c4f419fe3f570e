"""What becomes of generations, in vLLM's own `/metrics`: with several API servers, the sum over all of them."""

from __future__ import annotations

import os
from typing import Any

from agentlightning.recorder import LOST, WRITE_SECONDS, Counters

__all__ = ["Metrics"]


class Metrics:
    """Counts on Prometheus's metrics what a recorder's counters have grown by since the last call."""

    def __init__(self) -> None:
        # vLLM's own. Not at the top: it decides on its import whether there are several processes.
        from prometheus_client import Counter, Gauge, Histogram

        self._begin()
        os.register_at_fork(after_in_child=self._begin)
        self._generations: Any = Counter("agentlightning_generations", "Generations that the store has.")
        self._tokens: Any = Counter("agentlightning_tokens", "Token ids that the store has.", ["kind"])
        self._lost: Any = Counter(
            "agentlightning_lost_generations", "Generations that the store does not have.", ["reason"]
        )
        self._queue_bytes: Any = Gauge(
            "agentlightning_queue_bytes", "What waits in memory for the store.", multiprocess_mode="livesum"
        )
        self._writes: Any = Histogram(
            "agentlightning_write_seconds", "How long the store took to write a batch.", buckets=WRITE_SECONDS
        )
        # Shown from the start: a counter that comes into being with its first loss has not risen for Prometheus.
        for kind in ("prompt", "output"):
            self._tokens.labels(kind)
        for reason in LOST:
            self._lost.labels(reason)

    def _begin(self) -> None:
        # A process that was forked counts from nothing, as its recorder does.
        self._seen = Counters()

    def __call__(self, counters: Counters) -> None:
        """To be called after every write."""
        seen, self._seen = self._seen, counters
        self._generations.inc(counters.generations - seen.generations)
        self._tokens.labels("prompt").inc(counters.prompt_tokens - seen.prompt_tokens)
        self._tokens.labels("output").inc(counters.output_tokens - seen.output_tokens)
        for reason, count in counters.lost.items():
            self._lost.labels(reason).inc(count - seen.lost[reason])
        self._queue_bytes.set(counters.queue_bytes)
        if sum(counters.writes) > sum(seen.writes):
            self._writes.observe(counters.write_seconds - seen.write_seconds)
