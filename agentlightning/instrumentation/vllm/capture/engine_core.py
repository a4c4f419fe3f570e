"""The engine core's side: it records the requests without a mark, and packs logprobs for those that ask so.

They come and go by three methods of vLLM's `Scheduler`: `add_request`, `update_from_output` with what each step has
sampled, and `finish_requests` for those that are given up. All of it happens in the one thread of the engine core.
"""

from __future__ import annotations

import functools
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from agentlightning import settings
from agentlightning.generation import Choice, Generation
from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import logprobs, marks, request_names, session
from agentlightning.instrumentation.vllm.capture.conversion import (
    as_json,
    prompt_ids_of,
    routed_experts,
    status_of,
    weight_versions,
)
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["CORE_PATCHES", "MESSAGE_PATCHES", "SCHEDULER_PATCHES"]

logger = logging.getLogger("agentlightning")

_unmarked: WeakKeyDictionary[Any, Unmarked] = WeakKeyDictionary()
_packed: set[str] = set()
"""The requests whose logprobs an instrumented frontend asks for, to record them itself."""
_weights: str | None = None
"""Those of the engine core in this process, where vLLM names them."""


@dataclass(slots=True)
class Followed:
    """A request to the engine, while it is followed.

    Attributes:
        request: vLLM's `Request`, which has the ids so far; None once it has ended.
        sampling_params: as the frontend made them.
        asks: whether only the recording wants logprobs.
        logprobs, routed_experts: arrays of each step; of the logprobs, the sampled ids' alone.
        weight_versions: the weights that it is sampled with, from which place on.
        finish_reason, stop_reason: as the engine says them.
    """

    request: Any
    sampling_params: Any
    asks: bool = False
    logprobs: list[array[float]] = field(default_factory=list)
    routed_experts: list[Any] = field(default_factory=list)
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    first_token_at: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def take(self, output: Any) -> None:
        """What a step has sampled for it: an `EngineCoreOutput` on its way to the frontend."""
        if self.first_token_at is None:
            self.first_token_at = time.time_ns()
            # In the statistics of the prefill from 0.22 on (as read); before, in every output.
            self.cached_tokens = getattr(getattr(output, "prefill_stats", output), "num_cached_tokens", None)
        if self.asks:
            logprobs.take(output, self.logprobs)
        elif output.new_logprobs is not None:
            self.logprobs.append(logprobs.first_of_each(output.new_logprobs.logprobs))
        experts = getattr(output, "routed_experts", None)
        if experts is not None:
            self.routed_experts.append(experts)


class Whole(NamedTuple):
    """What is kept of a `Request` that has ended: vLLM's own would keep its images and embeddings in memory."""

    request_id: str
    arrived_at: float
    prompt_token_ids: Sequence[int] | None
    token_ids: Sequence[int]
    lora_request: Any


class Unmarked:
    """The unfinished requests of one `Scheduler` that no instrumented process has sent.

    Attributes:
        config: vLLM's of the model.
    """

    def __init__(self, scheduler: Any) -> None:
        self.config = getattr(getattr(scheduler, "vllm_config", None), "model_config", None)
        self._followed: dict[str, Followed] = {}

    def __bool__(self) -> bool:
        return bool(self._followed)

    def follow(self, request: Any) -> None:
        """Follow a request from here on."""
        params = request.sampling_params
        followed = self._followed[request.request_id] = Followed(request, params)
        if settings.logprobs() and not logprobs.are_wanted(params):
            logprobs.ask_for_them(request)
            followed.asks = True
        if _weights is not None:
            followed.weight_versions.append((_weights, 0))

    def sampled(self, outputs: Any) -> None:
        """A step is over: `outputs` is what `update_from_output` gives."""
        for batch in _batches(outputs):
            for output in batch.outputs:
                followed = self._followed.get(output.request_id)
                if followed is not None:
                    # Each by itself: an output that cannot be read costs the others of its step nothing.
                    contained("recording a step of the engine", self._take, followed, output)

    def _take(self, followed: Followed, output: Any) -> None:
        try:
            followed.take(output)
        finally:
            if output.finish_reason is not None:
                followed.stop_reason = output.stop_reason
                self._end(followed, str(output.finish_reason))

    def given_up(self, request_ids: Iterable[str] | None) -> None:
        """These are to have ended, all of them for None."""
        for request_id in list(self._followed if request_ids is None else request_ids):
            followed = self._followed.get(request_id)
            if followed is not None and followed.request.is_finished():
                reason = str(followed.request.get_finished_reason())
                contained("recording what was given up", self._end, followed, reason)

    def give_up_all(self, finish_reason: str) -> None:
        """The engine ends, and with it all that is under way."""
        for followed in list(self._followed.values()):
            contained("recording what is under way", self._end, followed, finish_reason)

    def weights_are(self, version: str) -> None:
        """From the next step on other weights are sampled with."""
        for followed in self._followed.values():
            followed.weight_versions.append((version, len(followed.request.output_token_ids)))

    def _end(self, followed: Followed, finish_reason: str) -> None:
        request, followed.request = followed.request, None
        del self._followed[request.request_id]
        followed.finish_reason = finish_reason
        whole = Whole(
            request.request_id,
            request.arrival_time,
            prompt_ids_of(request),
            request.output_token_ids,
            request.lora_request,
        )
        ids = len(whole.prompt_token_ids or ()) + len(whole.token_ids)
        more = logprobs.BYTES_PER_PART * len(followed.logprobs)
        more += sum(chunk.nbytes for chunk in followed.routed_experts)
        session.keep(functools.partial(_generation_of, followed, whole, self.config, time.time_ns()), ids, more)


def _generation_of(followed: Followed, whole: Whole, config: Any, finished_at: int) -> Generation:
    name = request_names.read(whole.request_id, from_rust=_releases.uses_rust_frontend())
    token_ids = array("i", whole.token_ids)
    found = logprobs.of_sampled_ids(followed.logprobs, len(token_ids)) if followed.logprobs else None
    return Generation(
        request_id=name.request_id,
        response_id=name.response_id,
        endpoint=name.endpoint,
        model=session.served_name(config) if whole.lora_request is None else whole.lora_request.lora_name,
        rollout_id=name.rollout_id,
        attempt_id=name.attempt_id,
        started_at=int(whole.arrived_at * 1e9),
        first_token_at=followed.first_token_at,
        finished_at=finished_at,
        status=status_of([followed.finish_reason]),
        prompt_token_ids=array("i", whole.prompt_token_ids) if whole.prompt_token_ids else None,
        sampling_params=as_json(followed.sampling_params, settings.record_text()),
        logprobs_mode=None if found is None else logprobs.mode_of(config),
        cached_tokens=followed.cached_tokens,
        choices=[
            Choice(
                index=name.choice,
                token_ids=token_ids,
                logprobs=found,
                finish_reason=followed.finish_reason,
                stop_reason=followed.stop_reason,
                weight_versions=weight_versions(followed.weight_versions, len(token_ids)),
                routed_experts=routed_experts(followed.routed_experts),
            )
        ],
    )


def following(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `Scheduler.add_request`."""

    def add_request_and_follow(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # A pooling request has none.
        if getattr(request, "sampling_params", None) is not None:
            contained("recording a request of the engine core", _follow, self, request)
        return add_request(self, request, *args, **kwargs)

    return add_request_and_follow


def _follow(scheduler: Any, request: Any) -> None:
    mark = marks.take(request.request_id)
    if mark is not None:
        if mark is marks.Mark.RECORDED_WITH_LOGPROBS:
            _packed.add(request.request_id)
        return
    # Where more input comes in between (realtime), it is no prompt and its answer; nor is what ends such input, with
    # which a request comes again that the scheduler has.
    if getattr(request, "resumable", False) or request.request_id in getattr(scheduler, "requests", ()):
        return
    # The frontend has refused it, and tells the engine so that another one lets go of its keys and values (0.32).
    if getattr(request, "abort_immediately", False):
        return
    found = _unmarked.get(scheduler)
    if found is None:
        logger.warning(
            "agentlightning: requests come from a frontend that is not instrumented: the engine core records them"
        )
        found = _unmarked[scheduler] = Unmarked(scheduler)
        session.note_model(found.config)
    found.follow(request)


def sampling(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `Scheduler.update_from_output`, which runs once for each step of the engine."""

    def update_from_output_and_take(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = update_from_output(self, *args, **kwargs)
        unmarked = _unmarked.get(self)
        if unmarked:
            contained("recording a step of the engine", unmarked.sampled, outputs)
        return outputs

    return update_from_output_and_take


def packing(encode_into: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackEncoder.encode_into`, with which an engine core sends a frontend what a step has sampled."""

    def encode_into_packed(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if _packed and hasattr(obj, "outputs"):
            obj = contained("packing logprobs", _with_packed, obj) or obj
        return encode_into(self, obj, *args, **kwargs)

    return encode_into_packed


def _with_packed(batch: Any) -> Any:
    batch = copy(batch)
    batch.outputs = [logprobs.packed(output) if output.request_id in _packed else output for output in batch.outputs]
    _packed.difference_update(output.request_id for output in batch.outputs if output.finish_reason is not None)
    return batch


def _batches(outputs: Any) -> Iterable[Any]:
    """Of what `update_from_output` gives, for each frontend its own; to 0.9.0 there is one."""
    return outputs.values() if isinstance(outputs, dict) else (outputs,)


def giving_up(finish_requests: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `Scheduler.finish_requests`."""

    def finish_requests_and_give_up(self: Any, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        unmarked = _unmarked.get(self)
        if not (unmarked or _packed):
            return finish_requests(self, request_ids, *args, **kwargs)
        if request_ids is not None:
            # What can be iterated over only once is iterated over here.
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        answer = finish_requests(self, request_ids, *args, **kwargs)
        if unmarked:
            contained("recording what was given up", unmarked.given_up, request_ids)
        if request_ids is None:
            _packed.clear()
        else:
            _packed.difference_update(request_ids)
        return answer

    return finish_requests_and_give_up


def ending(finish_reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The wrapper around what an engine core does when it ends, by itself (`"abort"`) or by an error (`"error"`)."""

    def with_an_end(end: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_end(self: Any, *args: Any, **kwargs: Any) -> Any:
            contained("recording what is under way", _give_up_all, finish_reason)
            return end(self, *args, **kwargs)

        return record_and_end

    return with_an_end


def _give_up_all(finish_reason: str) -> None:
    if _unmarked:
        for unmarked in list(_unmarked.values()):
            unmarked.give_up_all(finish_reason)
        # Here and not at the interpreter's exit: who started this process waits for it only so long.
        session.recorder().close()


def beginning(init: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `EngineCore.__init__`, which names the weights that it begins with."""

    def init_and_note_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        contained("recording the first weights", lambda: _note_weights(self.get_weight_version()))

    return init_and_note_weights


def changing_weights(set_weight_version: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `EngineCore.set_weight_version`."""

    def set_weight_version_and_note(self: Any, weight_version: str, *args: Any, **kwargs: Any) -> Any:
        answer = set_weight_version(self, weight_version, *args, **kwargs)
        contained("recording other weights", _note_weights, weight_version)
        return answer

    return set_weight_version_and_note


def _note_weights(version: str) -> None:
    global _weights
    _weights = version
    for unmarked in _unmarked.values():
        unmarked.weights_are(version)


def _records(module: ModuleType) -> bool:
    return session.is_on()


def _has_weight_versions(module: ModuleType) -> bool:
    return session.is_on() and hasattr(module.EngineCore, "set_weight_version")


CORE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("EngineCoreProc._send_engine_dead", (), ending("error"))),
    Where(_records, Wrap("EngineCore.shutdown", (), ending("abort"))),
    Where(_has_weight_versions, Wrap("EngineCore.__init__", (), beginning)),
    Where(_has_weight_versions, Wrap("EngineCore.set_weight_version", ("weight_version",), changing_weights)),
)
SCHEDULER_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("Scheduler.add_request", ("request",), following)),
    Where(_records, Wrap("Scheduler.update_from_output", (), sampling)),
    Where(_records, Wrap("Scheduler.finish_requests", ("request_ids",), giving_up)),
)
MESSAGE_PATCHES: tuple[Patch, ...] = (Where(_records, Wrap("MsgpackEncoder.encode_into", ("obj", "buf"), packing)),)
