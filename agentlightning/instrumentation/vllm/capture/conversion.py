"""Convert what vLLM holds of a finished request to a `Generation`: the work of the writing thread."""

from __future__ import annotations

import functools
import json
import struct
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentlightning.generation import Choice, Generation, RoutedExperts, Status, TopLogprobs, Via
from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._carriers import is_forwarded
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import alternatives, logprobs, request_names

__all__ = [
    "CapturedRequest",
    "FinishedChoice",
    "from_frontend",
    "name_of",
    "packed_ids",
    "params_as_json",
    "prompt_ids_of",
    "requested_as_json",
    "routed_experts",
    "status_of",
    "weight_versions",
]

# The longest parameters that are cached: with a grammar, or a list of allowed ids, a client's may have megabytes.
_CACHED_BYTES = 4_000


@dataclass(slots=True)
class FinishedChoice:
    """The end of one request to the engine.

    Attributes:
        state: vLLM's `RequestState`; vLLM no longer changes its lists.
        finish_reason, stop_reason: those of vLLM's last `CompletionOutput` for it.
        routed_experts: arrays of the experts that its ids went through, in order.
        masks: what the ids were chosen from, if vLLM was told to return it.
    """

    state: Any
    finish_reason: str | None
    stop_reason: int | str | None = None
    routed_experts: list[Any] = field(default_factory=list)
    masks: alternatives.StepMasks | None = None


@dataclass(slots=True)
class CapturedRequest:
    """A request to the engine, or the `n` that vLLM makes of one, which become one generation.

    It does not hold vLLM's request, which would keep images and embeddings in memory until it is written.

    Attributes:
        replaced: what was asked for in place of what was pinned, of a request without a context.
    """

    name: str
    arrived_at: float
    prompt_token_ids: list[int] | None
    sampling_params: Any
    context: RequestContext | None
    logprobs_mode: str | None = None
    n: int = 1
    prompt_logprobs: Any = None
    replaced: Mapping[str, Any] | None = None
    unfinished: int = 0
    finished: list[FinishedChoice] = field(default_factory=list)

    def whose(self) -> tuple[str | None, str | None]:
        """Return the rollout and the attempt that it belongs to."""
        context = self.context or _context_from_name(self)
        return context.rollout_id, context.attempt_id


def name_of(request: Any) -> str:
    """Return the id that the frontend gave a request: from 0.14 on, vLLM appends eight characters to it."""
    return getattr(request, "external_req_id", None) or request.request_id


def prompt_ids_of(request: Any) -> list[int] | None:
    """Return the prompt ids of one of vLLM's requests; None if any of the prompt is embeddings.

    vLLM has placeholders among the ids for parts of a chat message that are embeddings.
    """
    return request.prompt_token_ids if getattr(request, "prompt_is_token_ids", None) is None else None


def from_frontend(captured: CapturedRequest, finished_at: int, keeps_text: bool) -> Generation:
    """Make the generation of a captured request whose choices have all ended.

    Args:
        finished_at: nanoseconds since the epoch.
        keeps_text: record text beside the ids.
    """
    state, context = captured.finished[0].state, captured.context or _context_from_name(captured)
    choices = sorted((_choice(choice, keeps_text) for choice in captured.finished), key=lambda choice: choice.index)
    return Generation(
        call_id=context.call_id if captured.context is not None else None,
        request_id=captured.name,
        response_id=_response_id(captured, context),
        endpoint=context.endpoint,
        model=context.model,
        rollout_id=context.rollout_id,
        attempt_id=context.attempt_id,
        session_id=context.session_id,
        trace_id=context.trace_id,
        agent_id=context.calling_agent_id,
        parent_agent_id=context.parent_agent_id,
        purpose=context.purpose,
        retry=context.retry,
        via=_via(context),
        started_at=int(captured.arrived_at * 1e9),
        first_token_at=_first_token_at(state),
        finished_at=finished_at,
        status=status_of([choice.finish_reason for choice in captured.finished]),
        # None for a prompt of embeddings.
        prompt_token_ids=packed_ids(captured.prompt_token_ids) if captured.prompt_token_ids else None,
        prompt_text=_prompt_text(captured, context) if keeps_text else None,
        sampling_params=params_as_json(captured.sampling_params, keeps_text),
        logprobs_mode=captured.logprobs_mode if any(choice.logprobs for choice in choices) else None,
        cached_tokens=getattr(state, "num_cached_tokens", None),
        choices=choices,
        served_model=context.served_model,
        requested_params=requested_as_json(context.replaced or captured.replaced),
        prompt_logprobs=_prompt_logprobs(captured),
    )


def requested_as_json(replaced: Mapping[str, Any] | None) -> str | None:
    """Return what the client had asked for in place of what was pinned."""
    return json.dumps(replaced, separators=(",", ":")) if replaced else None


def _prompt_logprobs(captured: CapturedRequest) -> TopLogprobs | None:
    positions, ids = captured.prompt_logprobs, captured.prompt_token_ids
    return alternatives.of_positions(positions, len(ids), also_alone=True) if positions and ids else None


def _prompt_text(captured: CapturedRequest, context: RequestContext) -> str | None:
    """Return the text of the prompt's ids; None where it may not match them, such as for a truncated prompt."""
    ids = captured.prompt_token_ids
    if ids is not None and context.text_limit is not None and len(ids) >= context.text_limit:
        return None
    return captured.finished[0].state.prompt


def _context_from_name(captured: CapturedRequest) -> RequestContext:
    """Describe a request that came by no HTTP request: over gRPC its id names the rollout."""
    context = RequestContext()
    if _releases.serves_grpc():
        context.rollout_id, context.attempt_id, context.agent_id = request_names.parse_client_id(captured.name)
    return context


def _via(context: RequestContext) -> Via:
    """Return how a request came."""
    if context.scope is not None:
        return "router" if is_forwarded(context.scope.get("headers", ())) else "http"
    return "grpc" if _releases.serves_grpc() else "process"


def _choice(finished: FinishedChoice, keeps_text: bool) -> Choice:
    state = finished.state
    token_ids = packed_ids(state.detokenizer.output_token_ids)
    return Choice(
        index=state.request_index,
        token_ids=token_ids,
        logprobs=_logprobs(state, token_ids),
        # There is no text if the client wanted none (detokenize).
        text=getattr(state.detokenizer, "output_text", None) if keeps_text else None,
        finish_reason=finished.finish_reason,
        stop_reason=finished.stop_reason if keeps_text or not isinstance(finished.stop_reason, str) else None,
        weight_versions=weight_versions(getattr(state, "weight_version_starts", ()), len(token_ids)),
        routed_experts=routed_experts(finished.routed_experts),
        sampling_mask=finished.masks and finished.masks.joined(len(token_ids)),
        top_logprobs=_top_logprobs(state, len(token_ids)),
    )


def _top_logprobs(state: Any, count: int) -> TopLogprobs | None:
    positions = state.logprobs_processor.logprobs
    return alternatives.of_positions(positions, count) if positions else None


def _logprobs(state: Any, token_ids: array[int]) -> array[float] | None:
    """Return one logprob for each id, if the client or the recording asked the engine for them; else None."""
    tap = state.logprobs_processor.update_from_output
    if isinstance(tap, logprobs.LogprobsTap):
        return logprobs.join(tap.found, len(token_ids))
    positions = state.logprobs_processor.logprobs
    if not positions or len(positions) != len(token_ids):
        return None
    return array("f", (position[token_id].logprob for position, token_id in zip(positions, token_ids, strict=True)))


def packed_ids(token_ids: Sequence[int]) -> array[int]:
    """Pack vLLM's ids: `struct` takes half as long as an array of them would, of a long prompt milliseconds less."""
    return array("i", struct.pack(f"{len(token_ids)}i", *token_ids))


def status_of(reasons: Collection[str | None]) -> Status:
    """Return how a generation ended whose choices have these of vLLM's finish reasons."""
    return "error" if "error" in reasons else "aborted" if "abort" in reasons else "finished"


def _response_id(captured: CapturedRequest, context: RequestContext) -> str:
    """Return the `id` of the answer, from the state of the HTTP request, or else from the engine request's name."""
    metadata = (context.scope or {}).get("state", {}).get("request_metadata")
    if metadata is not None:
        return metadata.request_id
    # What follows it numbers the engine requests of one call.
    before = f"{captured.name}-".find(f"-{context.base_id}-") if context.base_id else -1
    if context.base_id and before >= 0:
        return captured.name[: before + 1 + len(context.base_id)]
    return captured.name.rpartition("-")[0] if captured.name.startswith("cmpl-") else captured.name


def _first_token_at(state: Any) -> int | None:
    # Needs a server without --disable-log-stats, and 0.10.2 or later.
    latency = getattr(state.stats, "first_token_latency", 0.0)
    return int((state.stats.arrival_time + latency) * 1e9) if latency else None


def weight_versions(starts: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int, int]] | None:
    """Return (version, start, end) for each version of the weights that sampled some of `count` ids.

    Args:
        starts: each version, and the index of the first id sampled with it.
    """
    ends = [*(start for _, start in starts[1:]), count]
    spans = [(version, start, end) for (version, start), end in zip(starts, ends, strict=False)]
    return [span for span in spans if span[1] < span[2]] or None


def routed_experts(chunks: Sequence[Any]) -> RoutedExperts | None:
    """Concatenate vLLM's arrays, of shape [ids, layers, experts per id]."""
    if not chunks:
        return None
    ids = array("h")
    for chunk in chunks:
        ids.frombytes(chunk.astype("int16").tobytes())
    return RoutedExperts((sum(len(chunk) for chunk in chunks), *chunks[0].shape[1:]), ids)


def params_as_json(sampling_params: Any, keeps_text: bool) -> str:
    """Return vLLM's `SamplingParams` as JSON: what a client may have set, without defaults.

    Args:
        keeps_text: leave in values that are text.
    """
    import msgspec  # vLLM's own: its parameters are a Struct that leaves out defaults.

    encoded = msgspec.json.encode(sampling_params, enc_hook=repr)
    # Most of an agent's calls have the same short parameters.
    return (_filter_cached if len(encoded) <= _CACHED_BYTES else _filter)(encoded, keeps_text)


def _filter(sampling_params: bytes, keeps_text: bool) -> str:
    kept = {
        name: value
        for name, value in json.loads(sampling_params).items()
        if _is_from_client(name) and (keeps_text or not _has_text(value))
    }
    return json.dumps(kept, separators=(",", ":"))


_filter_cached = functools.lru_cache(1_000)(_filter)


def _is_from_client(name: str) -> bool:
    # All others are vLLM's own: what it has derived, and how it returns and copies results.
    return not name.startswith("_") and name not in ("output_kind", "skip_clone")


def _has_text(value: Any) -> bool:
    """Tell whether a value may hold a client's text; told by the value, since names differ between releases."""
    if isinstance(value, dict):
        # The keys of a logit bias are ids: JSON keys are always strings.
        return not all(key.isdecimal() for key in value) or any(map(_has_text, value.values()))
    return any(map(_has_text, value)) if isinstance(value, list) else isinstance(value, str)
