"""What becomes one generation: a request to the engine, or those that vLLM makes of one, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentlightning.instrumentation.vllm.request_context import RequestContext

__all__ = ["Ended", "Record"]


@dataclass(slots=True)
class Ended:
    """How one request to the engine ended.

    Attributes:
        state: vLLM's `RequestState`, whose lists it does not touch any more.
        finish_reason, stop_reason: as vLLM's last `CompletionOutput` for it has them.
        routed_experts: arrays of the experts that its ids went through, in order.
    """

    state: Any
    finish_reason: str | None
    stop_reason: int | str | None = None
    routed_experts: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """What becomes one generation: a request to the engine, or the `n` that vLLM makes of one."""

    name: str
    request: Any
    sampling_params: Any
    context: RequestContext | None
    logprobs_mode: str | None = None
    n: int = 1
    open: int = 0
    ended: list[Ended] = field(default_factory=list)
