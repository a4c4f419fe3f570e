"""A user's stat logger: the entry point group `vllm.stat_logger_plugins`."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from tests.plugins.describe import write


class StatLogger(StatLoggerBase):
    """Write down each finished request, and the names of the statistics, whose numbers vary."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *args: Any, **kwargs: Any) -> None:
        for finished in iteration_stats.finished_requests if iteration_stats else ():
            write("stat logger: finished", finished, sorted(vars(iteration_stats)), sorted(kwargs))
