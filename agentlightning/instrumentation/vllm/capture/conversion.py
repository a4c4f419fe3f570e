"""What vLLM knows of a request to the engine that has ended, as a `Generation`: the work of the thread that writes."""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentlightning import settings
from agentlightning.generation import Choice, Generation, RoutedExperts, Status
from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import logprobs, request_names

__all__ = [
    "Ended",
    "Record",
    "as_json",
    "generation_of",
    "prompt_ids_of",
    "routed_experts",
    "status_of",
    "weight_versions",
]

# Of a client's parameters: with a grammar, or the ids that are allowed, they may have megabytes.
_REMEMBERED_BYTES = 4_000


def generation_of(record: Record, finished_at: int) -> Generation:
    """The generation that a complete record is; `finished_at` is in nanoseconds since the epoch."""
    state, context = record.ended[0].state, record.context or _named(record)
    keeps_text = settings.record_text()
    choices = sorted((_choice(ended, keeps_text) for ended in record.ended), key=lambda choice: choice.index)
    return Generation(
        call_id=context.call_id if record.context is not None else None,
        request_id=record.name,
        response_id=_response_id(record, context),
        endpoint=context.endpoint,
        model=context.model,
        rollout_id=context.rollout_id,
        attempt_id=context.attempt_id,
        session_id=context.session_id,
        trace_id=context.trace_id,
        started_at=int(record.arrived_at * 1e9),
        first_token_at=_first_token_at(state),
        finished_at=finished_at,
        status=status_of([ended.finish_reason for ended in record.ended]),
        # A prompt of embeddings has none.
        prompt_token_ids=array("i", record.prompt_token_ids) if record.prompt_token_ids else None,
        prompt_text=_prompt_text(record, context) if keeps_text else None,
        sampling_params=as_json(record.sampling_params, keeps_text),
        logprobs_mode=record.logprobs_mode if any(choice.logprobs for choice in choices) else None,
        cached_tokens=getattr(state, "num_cached_tokens", None),
        choices=choices,
    )


def _prompt_text(record: Record, context: RequestContext) -> str | None:
    """The text of a prompt's ids; None where they may be others, as of a prompt that vLLM has cut."""
    ids = record.prompt_token_ids
    if ids is not None and context.text_limit is not None and len(ids) >= context.text_limit:
        return None
    return record.ended[0].state.prompt


def _named(record: Record) -> RequestContext:
    """What is known of a request that is behind no HTTP request: over gRPC its id names the rollout."""
    context = RequestContext()
    if _releases.serves_grpc():
        context.rollout_id, context.attempt_id = request_names.whose(record.name)
    return context


def _choice(ended: Ended, keeps_text: bool) -> Choice:
    state = ended.state
    token_ids = array("i", state.detokenizer.output_token_ids)
    return Choice(
        index=state.request_index,
        token_ids=token_ids,
        logprobs=_logprobs(state, token_ids),
        # None has been made where the client wanted none (detokenize).
        text=getattr(state.detokenizer, "output_text", None) if keeps_text else None,
        finish_reason=ended.finish_reason,
        stop_reason=ended.stop_reason if keeps_text or not isinstance(ended.stop_reason, str) else None,
        weight_versions=weight_versions(getattr(state, "weight_version_starts", ()), len(token_ids)),
        routed_experts=routed_experts(ended.routed_experts),
    )


def _logprobs(state: Any, token_ids: array[int]) -> array[float] | None:
    """Those of the sampled ids, where the client or we asked the engine for any; one an id, or none at all."""
    taking = state.logprobs_processor.update_from_output
    if isinstance(taking, logprobs.Taking):
        return logprobs.of_sampled_ids(taking.parts, len(token_ids))
    positions = state.logprobs_processor.logprobs
    if not positions or len(positions) != len(token_ids):
        return None
    return array("f", (position[token_id].logprob for position, token_id in zip(positions, token_ids, strict=True)))


def status_of(reasons: Collection[str | None]) -> Status:
    """How a generation ended, of whose choices these are vLLM's finish reasons."""
    return "error" if "error" in reasons else "aborted" if "abort" in reasons else "finished"


def _response_id(record: Record, context: RequestContext) -> str:
    """The `id` of the answer: vLLM leaves it in the HTTP request's state; without one, the engine's name has it."""
    metadata = (context.scope or {}).get("state", {}).get("request_metadata")
    if metadata is not None:
        return metadata.request_id
    # Behind it, those of one call have numbers.
    before = f"{record.name}-".find(f"-{context.base_id}-") if context.base_id else -1
    if context.base_id and before >= 0:
        return record.name[: before + 1 + len(context.base_id)]
    return record.name.rpartition("-")[0] if record.name.startswith("cmpl-") else record.name


def _first_token_at(state: Any) -> int | None:
    # Without --disable-log-stats, and from 0.10.2.
    latency = getattr(state.stats, "first_token_latency", 0.0)
    return int((state.stats.arrival_time + latency) * 1e9) if latency else None


def weight_versions(starts: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int, int]] | None:
    """The weights that `count` ids were sampled with, from the places where vLLM began to sample with others."""
    ends = [*(start for _, start in starts[1:]), count]
    spans = [(version, start, end) for (version, start), end in zip(starts, ends, strict=False)]
    return [span for span in spans if span[1] < span[2]] or None


def routed_experts(chunks: Sequence[Any]) -> RoutedExperts | None:
    """vLLM's arrays, put together; their shape is [ids, layers, experts an id]."""
    if not chunks:
        return None
    ids = array("h")
    for chunk in chunks:
        ids.frombytes(chunk.astype("int16").tobytes())
    return RoutedExperts((sum(len(chunk) for chunk in chunks), *chunks[0].shape[1:]), ids)


def as_json(sampling_params: Any, keeps_text: bool) -> str:
    """vLLM's `SamplingParams` as they are kept: what a client may have said, without defaults.

    Args:
        keeps_text: leave in what a client says about texts.
    """
    import msgspec  # vLLM's own: its parameters are a Struct that leaves out defaults.

    encoded = msgspec.json.encode(sampling_params, enc_hook=repr)
    # An agent's calls mostly have the same ones, and short ones.
    return (_said_before if len(encoded) <= _REMEMBERED_BYTES else _said)(encoded, keeps_text)


def _said(sampling_params: bytes, keeps_text: bool) -> str:
    said = {
        name: value
        for name, value in json.loads(sampling_params).items()
        if _is_said(name) and (keeps_text or not _has_text(value))
    }
    return json.dumps(said, separators=(",", ":"))


_said_before = functools.lru_cache(1_000)(_said)


def _is_said(name: str) -> bool:
    # The others are how vLLM works with them: what it has derived, and how it hands out and copies results.
    return not name.startswith("_") and name not in ("output_kind", "skip_clone")


def _has_text(value: Any) -> bool:
    """Whether a client may have said a text with this: told by the value, since releases have other names for it."""
    if isinstance(value, dict):
        # The bias of each id, whose keys are ids: JSON has no others than texts.
        return not all(key.isdecimal() for key in value) or any(map(_has_text, value.values()))
    return any(map(_has_text, value)) if isinstance(value, list) else isinstance(value, str)


# What becomes one generation: a request to the engine, or those that vLLM makes of one, and how they ended.


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
