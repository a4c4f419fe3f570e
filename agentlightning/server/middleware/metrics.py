"""Metrics for Prometheus, at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CONTENT_TYPE_LATEST", "Metrics", "MetricsMiddleware"]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Metrics of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_route = ("method", "route")
        self.requests = Counter(
            "agl_store_requests", "Requests answered.", (*by_route, "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "agl_store_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            by_route,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_progress = Gauge("agl_store_requests_in_progress", "Requests not answered yet.", registry=self.registry)
        self.waiting = Gauge("agl_store_writes_waiting", "Writes not committed yet.", registry=self.registry)
        self.rollouts = Gauge("agl_store_rollouts", "Rollouts by status.", ("status",), registry=self.registry)
        self._drift = _DriftCollector()
        self.registry.register(self._drift)

    def text(self, rollouts: Mapping[str, int], waiting: int, drift: Mapping[str, int]) -> bytes:
        """Return all metrics in Prometheus's text format.

        Args:
            drift: the store's totals: breaks by cause, and sampled ids `kept` and `lost`.
        """
        self._drift.totals = drift
        for status, number in rollouts.items():
            self.rollouts.labels(status).set(number)
        self.waiting.set(waiting)
        return generate_latest(self.registry)


class _DriftCollector(Collector):
    """Counters that the store keeps, not this process: all servers on it have the same."""

    totals: Mapping[str, int] = MappingProxyType({})

    def collect(self) -> Iterator[Metric]:
        about = "Prompts that are not what the model saw and said before, by cause."
        breaks = CounterMetricFamily("agentlightning_prefix_breaks", about, labels=("cause",))
        # What is lost may be kept once more calls have come, so this is a gauge.
        sampled = GaugeMetricFamily(
            "agentlightning_trainable_tokens_total",
            "Sampled ids that one row for each conversation can train, and those that it cannot.",
            labels=("fate",),
        )
        for name, count in self.totals.items():
            (sampled if name in ("kept", "lost") else breaks).add_metric((name,), count)
        yield breaks
        yield sampled


class MetricsMiddleware:
    """Count requests, and measure how long their answers take."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.in_progress.dec()
            # The pattern, not the path: with ids, each rollout would be a time series of its own.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "any"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - start)
