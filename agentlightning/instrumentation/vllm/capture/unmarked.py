"""Requests that the engine core records, since no instrumented frontend does: followed step by step to their end.

All of it happens in the one thread of the engine core, but for the conversion to a `Generation`.
"""

from __future__ import annotations

import functools
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentlightning.generation import Choice, Generation, TopLogprobs
from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._carriers import Caller, skips_probe
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import logprobs, request_names
from agentlightning.instrumentation.vllm.capture.alternatives import StepLogprobs, StepMasks
from agentlightning.instrumentation.vllm.capture.conversion import (
    packed_ids,
    params_as_json,
    prompt_ids_of,
    requested_as_json,
    routed_experts,
    status_of,
    weight_versions,
)
from agentlightning.instrumentation.vllm.capture.identity import served_name
from agentlightning.instrumentation.vllm.capture.session import session

__all__ = ["UnmarkedRequests"]


@dataclass(slots=True)
class TrackedRequest:
    """A request to the engine, and what its steps have given.

    Attributes:
        request: vLLM's `Request`, which has the ids so far; None once it has ended.
        sampling_params: as the frontend made them, or as they were pinned.
        replaced: what the client asked for in place of what was pinned.
        drops_logprobs: only the recording wants the logprobs, so they are removed from the outputs.
        logprobs: those of the sampled ids.
        routed_experts: one array for each step.
        masks: what the ids were chosen from.
        top_logprobs, prompt_logprobs: those that the client asked for, if it did.
        weight_versions: each version of the weights, and the index of the first id sampled with it.
        finish_reason, stop_reason: the engine's.
    """

    request: Any
    sampling_params: Any
    replaced: Mapping[str, Any] | None = None
    drops_logprobs: bool = False
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    routed_experts: list[Any] = field(default_factory=list)
    masks: StepMasks = field(default_factory=StepMasks)
    top_logprobs: StepLogprobs | None = None
    prompt_logprobs: StepLogprobs | None = None
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    first_token_at: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, output: Any) -> None:
        """Add what a step has sampled: an `EngineCoreOutput` on its way to the frontend."""
        if self.first_token_at is None:
            self.first_token_at = time.time_ns()
            # From 0.22 on (as read) in the statistics of the prefill; before, in every output.
            self.cached_tokens = getattr(getattr(output, "prefill_stats", output), "num_cached_tokens", None)
        if self.drops_logprobs:
            logprobs.take(output, self.logprobs)
        elif output.new_logprobs is not None:
            logprobs.add_sampled(output.new_logprobs.logprobs, self.logprobs)
            if self.top_logprobs is not None:
                self.top_logprobs.add((output.new_logprobs.logprob_token_ids, output.new_logprobs.logprobs))
        prompt = getattr(output, "new_prompt_logprobs_tensors", None)
        if prompt is not None and self.prompt_logprobs is not None:
            self.prompt_logprobs.add(prompt)
        mask = getattr(output, "new_sampling_mask", None)
        if mask is not None:
            self.masks.add(mask)
        experts = getattr(output, "routed_experts", None)
        if experts is not None:
            self.routed_experts.append(experts)


class FinishedRequest(NamedTuple):
    """The parts of an ended `Request` that are kept: vLLM's own would keep its images and embeddings in memory."""

    request_id: str
    arrived_at: float
    prompt_token_ids: Sequence[int] | None
    token_ids: Sequence[int]
    lora_request: Any


class UnmarkedRequests:
    """The unfinished requests of one `Scheduler` that no instrumented process has sent.

    Args:
        weights: the version of the weights that the engine samples with, where vLLM names it.

    Attributes:
        config: vLLM's `ModelConfig`.
    """

    def __init__(self, scheduler: Any, weights: str | None = None) -> None:
        self.config = getattr(getattr(scheduler, "vllm_config", None), "model_config", None)
        self._weights = weights
        self._tracked: dict[str, TrackedRequest] = {}

    def __len__(self) -> int:
        return len(self._tracked)

    def under_way(self) -> list[tuple[str | None, str | None]]:
        """Return the rollout and the attempt of each; for the writing thread, while the engine's changes them."""
        return [_whose(request_id) for request_id in list(self._tracked)]

    def track(self, request: Any, replaced: Mapping[str, Any] | None = None) -> None:
        """Follow a request that the scheduler is about to get, unless `agl doctor` made it.

        Args:
            replaced: what the client asked for in place of what was pinned.
        """
        if skips_probe(Caller(rollout_id=_whose(request.request_id)[0]), request):
            return
        params = request.sampling_params
        tracked = self._tracked[request.request_id] = TrackedRequest(request, params, replaced)
        if session.settings.logprobs and not logprobs.are_requested(params):
            logprobs.request_from_engine(request)
            tracked.drops_logprobs = True
        if params.logprobs:
            tracked.top_logprobs = StepLogprobs(params.logprobs)
        if params.prompt_logprobs is not None:
            tracked.prompt_logprobs = StepLogprobs(params.prompt_logprobs)
        if self._weights is not None:
            tracked.weight_versions.append((self._weights, 0))

    def add_step(self, outputs: Any) -> None:
        """Add a step of the engine; `outputs` is the result of `update_from_output`."""
        for batch in _batches(outputs):
            for output in batch.outputs:
                tracked = self._tracked.get(output.request_id)
                # Most outputs have an id and nothing else, which vLLM's own request keeps.
                if tracked is not None and (tracked.first_token_at is None or _has_more(output)):
                    # One by one: an output that cannot be read must not affect the others of its step.
                    contained("recording a step of the engine", self._add, tracked, output)

    def _add(self, tracked: TrackedRequest, output: Any) -> None:
        try:
            tracked.add(output)
        finally:
            if output.finish_reason is not None:
                tracked.stop_reason = output.stop_reason
                self._end(tracked, str(output.finish_reason))

    def end_finished(self, request_ids: Iterable[str] | None) -> None:
        """Record those of these requests (None: of all) that vLLM has just finished, such as aborted ones."""
        for request_id in list(self._tracked if request_ids is None else request_ids):
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.request.is_finished():
                reason = str(tracked.request.get_finished_reason())
                contained("recording a request that ended early", self._end, tracked, reason)

    def end_all(self, finish_reason: str) -> None:
        """Record all requests with this reason: the engine ends."""
        for tracked in list(self._tracked.values()):
            contained("recording a request that ended early", self._end, tracked, finish_reason)

    def note_weights(self, version: str) -> None:
        """Note that the engine samples with other weights from the next step on."""
        self._weights = version
        for tracked in self._tracked.values():
            tracked.weight_versions.append((version, len(tracked.request.output_token_ids)))

    def _end(self, tracked: TrackedRequest, finish_reason: str) -> None:
        request, tracked.request = tracked.request, None
        try:
            self._record(tracked, request, finish_reason)
        except Exception as error:
            session.recorder.note_lost(functools.partial(_whose, request.request_id), error)
            raise
        finally:
            # Not before: the writing thread takes what is neither here nor in its queue for written.
            del self._tracked[request.request_id]

    def _record(self, tracked: TrackedRequest, request: Any, finish_reason: str) -> None:
        tracked.finish_reason = finish_reason
        finished = FinishedRequest(
            request.request_id,
            request.arrival_time,
            prompt_ids_of(request),
            request.output_token_ids,
            request.lora_request,
        )
        ids = len(finished.prompt_token_ids or ()) + len(finished.token_ids)
        more = tracked.logprobs.itemsize * len(tracked.logprobs)
        more += sum(chunk.nbytes for chunk in tracked.routed_experts) + tracked.masks.nbytes
        more += sum(each.nbytes for each in (tracked.top_logprobs, tracked.prompt_logprobs) if each is not None)
        keeps_text = session.settings.record_text
        build = functools.partial(_generation_of, tracked, finished, self.config, time.time_ns(), keeps_text)
        session.record(build, ids, more, functools.partial(_whose, request.request_id))


def _prompt_logprobs(tracked: TrackedRequest, finished: FinishedRequest) -> TopLogprobs | None:
    found, ids = tracked.prompt_logprobs, finished.prompt_token_ids
    # The first id has none.
    return None if found is None or not ids else found.joined(len(ids), skipped=1)


def _whose(request_id: str) -> tuple[str | None, str | None]:
    name = request_names.parse(request_id, from_rust=_releases.uses_rust_frontend())
    return name.rollout_id, name.attempt_id


def _batches(outputs: Any) -> Iterable[Any]:
    """Return the parts of a step's outputs, one for each frontend; up to 0.9.0 there is only one."""
    return outputs.values() if isinstance(outputs, dict) else (outputs,)


def _has_more(output: Any) -> bool:
    """Tell whether an `EngineCoreOutput` has anything besides an id that is to be recorded."""
    return (
        output.new_logprobs is not None
        or output.finish_reason is not None
        or getattr(output, "routed_experts", None) is not None
        or getattr(output, "new_sampling_mask", None) is not None
        or getattr(output, "new_prompt_logprobs_tensors", None) is not None
    )


def _generation_of(
    tracked: TrackedRequest, finished: FinishedRequest, config: Any, finished_at: int, keeps_text: bool
) -> Generation:
    name = request_names.parse(finished.request_id, from_rust=_releases.uses_rust_frontend())
    token_ids = packed_ids(finished.token_ids)
    found = logprobs.join(tracked.logprobs, len(token_ids)) if tracked.logprobs else None
    return Generation(
        request_id=name.request_id,
        response_id=name.response_id,
        endpoint=name.endpoint,
        model=served_name(config) if finished.lora_request is None else finished.lora_request.lora_name,
        rollout_id=name.rollout_id,
        attempt_id=name.attempt_id,
        agent_id=name.agent_id,
        via="engine",
        started_at=int(finished.arrived_at * 1e9),
        first_token_at=tracked.first_token_at,
        finished_at=finished_at,
        status=status_of([tracked.finish_reason]),
        prompt_token_ids=packed_ids(finished.prompt_token_ids) if finished.prompt_token_ids else None,
        sampling_params=params_as_json(tracked.sampling_params, keeps_text),
        requested_params=requested_as_json(tracked.replaced),
        logprobs_mode=None if found is None else logprobs.mode_of(config),
        cached_tokens=tracked.cached_tokens,
        choices=[
            Choice(
                index=name.choice,
                token_ids=token_ids,
                logprobs=found,
                finish_reason=tracked.finish_reason,
                stop_reason=tracked.stop_reason,
                weight_versions=weight_versions(tracked.weight_versions, len(token_ids)),
                routed_experts=routed_experts(tracked.routed_experts),
                sampling_mask=tracked.masks.joined(len(token_ids)),
                top_logprobs=tracked.top_logprobs and tracked.top_logprobs.joined(len(token_ids)),
            )
        ],
        prompt_logprobs=_prompt_logprobs(tracked, finished),
    )
