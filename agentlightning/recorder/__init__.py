"""From an event loop to a store: a queue bounded in bytes, and one thread that writes. Knows no vLLM.

`Recorder.record` takes microseconds, however long the generation. The thread does everything else: building the
generation, packing, writing, waiting for a slow or unreachable store, recording how many generations were lost, and
telling the store up to which moment all that had ended is written.
"""

from __future__ import annotations

from agentlightning.recorder._counters import (
    LOST,
    NOT_BUILT,
    QUEUE_FULL,
    REFUSED,
    STOPPED,
    WRITE_SECONDS,
    Counters,
    Whose,
)
from agentlightning.recorder._recorder import BATCH_GENERATIONS, Recorder

__all__ = [
    "BATCH_GENERATIONS",
    "LOST",
    "NOT_BUILT",
    "QUEUE_FULL",
    "REFUSED",
    "STOPPED",
    "WRITE_SECONDS",
    "Counters",
    "Recorder",
    "Whose",
]
