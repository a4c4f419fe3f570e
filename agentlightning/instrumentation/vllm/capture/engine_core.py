"""The capture in the engine core: record and pin the requests without a mark, and pack logprobs for those marked so.

Requests enter and leave by three methods of vLLM's `Scheduler`: `add_request`, `update_from_output` with the result of
each step, and `finish_requests` for those that end early.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from agentlightning.instrumentation.vllm import _releases, sampling
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import alternatives, logprobs, marks
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.capture.unmarked import UnmarkedRequests
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["CORE_PATCHES", "MESSAGE_PATCHES", "SCHEDULER_PATCHES"]

logger = logging.getLogger("agentlightning")

_unmarked: WeakKeyDictionary[Any, UnmarkedRequests] = WeakKeyDictionary()
_packed: set[str] = set()
"""Requests whose logprobs only an instrumented frontend wants, to record them."""
_weights: str | None = None
"""The version of the weights that the engine core in this process samples with, where vLLM names it."""


def wrap_add_request(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.add_request`."""

    def track_and_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # A pooling request has no sampling parameters.
        if getattr(request, "sampling_params", None) is not None:
            contained("recording a request of the engine core", _begin, self, request)
        return add_request(self, request, *args, **kwargs)

    return track_and_add_request


def _begin(scheduler: Any, request: Any) -> None:
    mark = marks.take(request.request_id)
    if mark is not None:
        if mark is marks.Mark.RECORDED_WITH_LOGPROBS:
            _packed.add(request.request_id)
        return
    # With more input in between (realtime) it is not one prompt and its answer. What ends such input is a request that
    # the scheduler already has.
    if getattr(request, "resumable", False) or request.request_id in getattr(scheduler, "requests", ()):
        return
    # The frontend has refused it, and tells the engine so that another engine releases its keys and values (0.32).
    if getattr(request, "abort_immediately", False):
        return
    replaced = contained("pinning sampling parameters", sampling.pin_unseen, request) if _pins() else None
    if session.is_recording:
        _track(scheduler, request, replaced)


def _pins() -> bool:
    """Tell whether a request without a mark is to be pinned: an instrumented frontend marks its own if it records."""
    return sampling.is_pinned() and session.is_recording


def _track(scheduler: Any, request: Any, replaced: Mapping[str, Any] | None) -> None:
    found = _unmarked.get(scheduler)
    if found is None:
        logger.warning(
            "agentlightning: requests come from a frontend that is not instrumented; the engine core records them"
        )
        found = _unmarked[scheduler] = UnmarkedRequests(scheduler, _weights)
        session.identity.note_model(found.config)
        session.follow(found)
        # Not with the first generation: until then, the store would not know that there is anything to wait for.
        session.recorder.start()
    found.track(request, replaced)


def wrap_update_from_output(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.update_from_output`, which runs once for each step of the engine."""

    def update_from_output_and_record(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = update_from_output(self, *args, **kwargs)
        unmarked = _unmarked.get(self)
        if unmarked:
            contained("recording a step of the engine", unmarked.add_step, outputs)
        return outputs

    return update_from_output_and_record


def wrap_finish_requests(finish_requests: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.finish_requests`, which ends requests early."""

    def finish_requests_and_record(self: Any, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        unmarked = _unmarked.get(self)
        if not (unmarked or _packed):
            return finish_requests(self, request_ids, *args, **kwargs)
        if request_ids is not None:
            # It may be an iterator, and is needed twice.
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        answer = finish_requests(self, request_ids, *args, **kwargs)
        if unmarked:
            contained("recording requests that ended early", unmarked.end_finished, request_ids)
        if request_ids is None:
            _packed.clear()
        else:
            _packed.difference_update(request_ids)
        return answer

    return finish_requests_and_record


def wrap_encode_into(encode_into: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackEncoder.encode_into`, with which an engine core sends a step's outputs to a frontend."""

    def encode_into_packed(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if _packed and hasattr(obj, "outputs"):
            obj = contained("packing logprobs", _with_packed, obj) or obj
        return encode_into(self, obj, *args, **kwargs)

    return encode_into_packed


def _with_packed(batch: Any) -> Any:
    batch = copy(batch)
    batch.outputs = [logprobs.pack(output) if output.request_id in _packed else output for output in batch.outputs]
    _packed.difference_update(output.request_id for output in batch.outputs if output.finish_reason is not None)
    return batch


def wrap_end(finish_reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the wrapper for a method that ends an engine core: on shutdown (`"abort"`) or an error (`"error"`)."""

    def wrap(end: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_end(self: Any, *args: Any, **kwargs: Any) -> Any:
            contained("recording unfinished requests", _end_all, finish_reason)
            return end(self, *args, **kwargs)

        return record_and_end

    return wrap


def _end_all(finish_reason: str) -> None:
    if _unmarked:
        for unmarked in list(_unmarked.values()):
            unmarked.end_all(finish_reason)
        # Here and not at interpreter exit: the process that started this one waits only so long for it.
        with _signals_ignored():
            session.recorder.close()


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM in the block: vLLM has reset their handlers, so a second one would kill the process.

    A signal to the whole process group is followed by one of the manager of engine cores.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            # None: not set by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def wrap_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `EngineCore.__init__`, after which the engine core names the weights that it begins with.

    Behind the Rust frontend it also registers with the store: with its first request, whoever waits for the recorded
    calls of a rollout could ask the store before it knows that there is anything to wait for.
    """

    def init_and_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if hasattr(self, "get_weight_version"):
            contained("reading the first weights' version", lambda: _note_weights(self.get_weight_version()))
        if _releases.uses_rust_frontend():
            contained("registering with the store", _register, self.vllm_config)

    return init_and_begin


def _register(vllm_config: Any) -> None:
    session.identity.note_model(vllm_config.model_config)
    session.recorder.start()
    alternatives.warn_of_missing_masks(vllm_config.model_config)


def wrap_set_weight_version(set_weight_version: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `EngineCore.set_weight_version`."""

    def set_weight_version_and_note(self: Any, weight_version: str, *args: Any, **kwargs: Any) -> Any:
        answer = set_weight_version(self, weight_version, *args, **kwargs)
        contained("reading the new weights' version", _note_weights, weight_version)
        return answer

    return set_weight_version_and_note


def _note_weights(version: str) -> None:
    global _weights
    _weights = version
    for unmarked in _unmarked.values():
        unmarked.note_weights(version)


def _records(module: ModuleType) -> bool:
    return session.is_recording


def _records_or_pins(module: ModuleType) -> bool:
    return session.is_recording or sampling.is_pinned()


def _has_weight_versions(module: ModuleType) -> bool:
    return session.is_recording and hasattr(module.EngineCore, "set_weight_version")


CORE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("EngineCoreProc._send_engine_dead", (), wrap_end("error"))),
    Where(_records, Wrap("EngineCore.shutdown", (), wrap_end("abort"))),
    Where(_records, Wrap("EngineCore.__init__", (), wrap_init)),
    Where(_has_weight_versions, Wrap("EngineCore.set_weight_version", ("weight_version",), wrap_set_weight_version)),
)
SCHEDULER_PATCHES: tuple[Patch, ...] = (
    Where(_records_or_pins, Wrap("Scheduler.add_request", ("request",), wrap_add_request)),
    Where(_records, Wrap("Scheduler.update_from_output", (), wrap_update_from_output, is_frequent=True)),
    Where(_records, Wrap("Scheduler.finish_requests", ("request_ids",), wrap_finish_requests)),
)
MESSAGE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("MsgpackEncoder.encode_into", ("obj", "buf"), wrap_encode_into, is_frequent=True)),
)
