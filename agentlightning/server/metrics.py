"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CONTENT_TYPE_LATEST", "Metrics", "Watched"]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_route = ("method", "route")
        self.requests = Counter(
            "agl_store_requests", "Requests that were answered.", (*by_route, "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "agl_store_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            by_route,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "agl_store_requests_in_progress", "Requests that are not answered yet.", registry=self.registry
        )
        self.waiting = Gauge("agl_store_writes_waiting", "Writes that are not committed yet.", registry=self.registry)
        self.rollouts = Gauge("agl_store_rollouts", "Rollouts by status.", ("status",), registry=self.registry)

    def text(self, rollouts: Mapping[str, int], waiting: int) -> bytes:
        """All of them, in Prometheus's text format."""
        for status, number in rollouts.items():
            self.rollouts.labels(status).set(number)
        self.waiting.set(waiting)
        return generate_latest(self.registry)


class Watched:
    """ASGI middleware that counts what is answered inside of it, and how long it takes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, note)
        finally:
            self._metrics.in_progress.dec()
            # The pattern, not the path: ids would make a series of every rollout.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "any"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - start)
