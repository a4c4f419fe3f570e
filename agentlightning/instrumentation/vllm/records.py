"""What becomes one generation: a request to the engine, or those that vLLM makes of one, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentlightning.instrumentation.vllm.request_context import RequestContext

__all__ = ["Ended", "Record", "prompt_ids_of"]


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
    """What becomes one generation: a request to the engine, or the `n` that vLLM makes of one.

    Not vLLM's request itself, which would keep its images and embeddings in memory for as long as this waits.
    """

    name: str
    arrived_at: float
    prompt_token_ids: list[int] | None
    sampling_params: Any
    context: RequestContext | None
    logprobs_mode: str | None = None
    n: int = 1
    open: int = 0
    ended: list[Ended] = field(default_factory=list)


def prompt_ids_of(request: Any) -> list[int] | None:
    """The ids that went in, of one of vLLM's requests; None where embeddings did.

    Where some of a prompt is embeddings (parts of a chat message), vLLM has placeholders for them among its ids.
    """
    return request.prompt_token_ids if getattr(request, "prompt_is_token_ids", None) is None else None
