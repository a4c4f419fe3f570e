"""The capture in a process that answers: from `OutputProcessor.add_request` to the end of each engine request.

`add_request` runs in the task that serves the HTTP request, so a context variable leads from there to that request. An
engine request ends in one of three ways, each a method of vLLM's `OutputProcessor`: the engine is done with it
(`process_outputs`), the client no longer waits for it (`abort_requests`), or the engine is dead (`propagate_error`).
These three are wrapped only if generations are recorded, or continued by later ones. The engine of an offline `LLM` has
the same `OutputProcessor`, and returns its outputs instead of putting them into queues.
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from agentlightning.instrumentation.vllm import _context, _releases, continuation, sampling
from agentlightning.instrumentation.vllm._carriers import skips_probe
from agentlightning.instrumentation.vllm._context import EngineRequest, RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import alternatives, logprobs, marks
from agentlightning.instrumentation.vllm.capture.conversion import (
    CapturedRequest,
    FinishedChoice,
    from_frontend,
    name_of,
    prompt_ids_of,
)
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = [
    "CAPTURE_PATCHES",
    "CLIENT_PATCHES",
    "SECONDS_TO_REGISTER",
    "PendingRequests",
    "begin_client",
    "end_all",
    "find_pending",
    "forget_all",
    "is_recorded_offline",
    "record_offline",
    "start",
]

logger = logging.getLogger("agentlightning")

SECONDS_TO_REGISTER = 1.0
"""The most that a server waits for its store before it serves, in all: vLLM itself takes far longer to start."""

# vLLM's object for one logprob that a client has asked for, with its text and its place in a dictionary.
BYTES_PER_LOGPROB = 300

_pending: WeakKeyDictionary[Any, PendingRequests] = WeakKeyDictionary()
_logprobs_modes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_offline: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""The output processors of offline engines that are recorded: whether the engine core is in this process."""


def start(patience: float = 0.0) -> None:
    """Open the store before the first request needs it, so that an unusable store is reported when a server starts.

    Args:
        patience: seconds to wait at most until the store knows this process.
    """
    session.recorder.start(patience)
    # Registered after the recorder's own exit handler, and so called before it: it still takes what is aborted here.
    atexit.unregister(end_all)
    atexit.register(end_all)


def find_pending(processor: Any) -> PendingRequests | None:
    """Return the unfinished requests of an `OutputProcessor`; None if it never had a request that is recorded."""
    return _pending.get(processor)


def _pending_of(processor: Any) -> PendingRequests:
    found = _pending.get(processor)
    if found is None:
        # Before anything is kept: where the store cannot be opened, the next request tries again.
        if session.is_recording:
            start()
        found = _pending[processor] = PendingRequests(_close, _logprobs_modes.get(processor), _note_lost)
        if session.is_recording:
            session.follow(found)
    return found


def end_all() -> None:
    """Record all unfinished requests of this process as aborted: the server ends."""
    for pending in list(_pending.values()):
        pending.end_all("abort")


def forget_all() -> None:
    """Record no unfinished request, and no offline engine: the patches that would see them end are being removed."""
    count = sum(len(pending) for pending in _pending.values())
    if count:
        logger.warning(
            "agentlightning: %d unfinished requests are not recorded, since the patches were removed meanwhile", count
        )
    for pending in list(_pending.values()):
        contained("counting unfinished requests as lost", pending.lose_all, RuntimeError("the patches were removed"))
    _pending.clear()
    _offline.clear()


def wrap_add_request(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OutputProcessor.add_request`, which runs once for each request to the engine."""
    follows, wants_logprobs = session.follows_requests, session.is_recording and session.settings.logprobs
    pins = sampling.is_pinned()

    def add_request_and_capture(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        context = _context.current()
        collects = context is not None and context.collects
        replaced = contained("pinning sampling parameters", _pin, request, parent_req) if pins else None
        if not (collects or follows):
            return add_request(self, request, prompt, parent_req, *args, **kwargs)
        # vLLM also calls this with more input for a known request (realtime).
        is_new = contained("looking for a request", _is_new, self, request)
        answer = add_request(self, request, prompt, parent_req, *args, **kwargs)
        state = contained("finding a request", _state_of, self, request) if is_new else None
        if state is not None:
            if context is not None and collects:
                contained("capturing a request", _collect, state, request, context)
            if follows:
                contained(
                    "recording a request", _follow, self, state, request, parent_req, context, replaced, wants_logprobs
                )
        return answer

    return add_request_and_capture


def _pin(request: Any, parent: Any) -> Mapping[str, Any] | None:
    """Pin the parameters of a request over gRPC; those over HTTP are pinned when vLLM makes them."""
    if request.sampling_params is None or not _releases.serves_grpc():
        return None
    return sampling.pin_unseen(request, parent)


def _is_new(processor: Any, request: Any) -> bool:
    return request.request_id not in processor.request_states


def _state_of(processor: Any, request: Any) -> Any:
    """Return vLLM's state of a request; None for a pooling request, which has no detokenizer and generates no ids."""
    state = processor.request_states[request.request_id]
    return None if state.detokenizer is None else state


def _collect(state: Any, request: Any, context: RequestContext) -> None:
    context.engine_requests.append(EngineRequest(name_of(request), prompt_ids_of(request), state.detokenizer))


def _follow(
    processor: Any,
    state: Any,
    request: Any,
    parent: Any,
    context: RequestContext | None,
    replaced: Mapping[str, Any] | None,
    wants_logprobs: bool,
) -> None:
    mark = marks.Mark.RECORDED
    # An offline engine has no queue. With more input in between (realtime), it is not one prompt and its answer.
    is_followed = state.queue is not None or processor in _offline
    if is_followed and not getattr(request, "resumable", False) and not skips_probe(context, request):
        _pending_of(processor).add(state, request, parent, context, replaced)
        if wants_logprobs and not logprobs.are_requested(request.sampling_params):
            state.logprobs_processor.update_from_output = logprobs.LogprobsTap(state.logprobs_processor)
            logprobs.request_from_engine(request)
            # An engine core in this process packs nothing.
            if not _offline.get(processor):
                mark = marks.Mark.RECORDED_WITH_LOGPROBS
    # vLLM sends the request to the engine after this returns.
    if session.is_recording:
        marks.add(request.request_id, mark)


def wrap_process_outputs(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OutputProcessor.process_outputs`, which runs once for each step of the engine."""

    def process_outputs_and_finish(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        # An error here would end vLLM's loop, and with it the engine.
        states = getattr(self, "request_states", ())
        before = len(states)
        answer = process_outputs(self, engine_core_outputs, *args, **kwargs)
        # Most steps finish no request; this check costs the same however many requests are in the step.
        if len(states) < before:
            contained("recording finished requests", _finish, self, engine_core_outputs, answer)
        return answer

    return process_outputs_and_finish


def _finish(processor: Any, engine_core_outputs: Any, answer: Any) -> None:
    pending = find_pending(processor)
    if pending is not None:
        states = processor.request_states
        returned = _by_request(answer.request_outputs) if processor in _offline else {}
        for last in [output for output in engine_core_outputs if output.request_id not in states]:
            contained("recording a finished request", pending.finish, last, returned)


def _by_request(outputs: Iterable[Any]) -> dict[str, Any]:
    """Return an offline engine's outputs of a step by their request's id; None where several have the same."""
    found: dict[str, Any] = {}
    for output in outputs:
        found[output.request_id] = None if output.request_id in found else output
    return found


def wrap_abort_requests(abort_requests: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OutputProcessor.abort_requests`, which returns the ids of the requests that it has ended."""

    def abort_requests_and_record(self: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = abort_requests(self, *args, **kwargs)
        pending = find_pending(self)
        if pending is not None:
            contained("recording aborted requests", pending.end, aborted, "abort")
        return aborted

    return abort_requests_and_record


def wrap_propagate_error(propagate_error: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OutputProcessor.propagate_error`: the engine is dead, and every unfinished request fails."""

    def record_and_propagate_error(self: Any, *args: Any, **kwargs: Any) -> Any:
        pending = find_pending(self)
        if pending is not None:
            contained("recording requests that the engine failed", pending.end_all, "error")
        return propagate_error(self, *args, **kwargs)

    return record_and_propagate_error


def wrap_client_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.__init__`, which has the model, its tokenizer, and the kind of logprobs."""

    def init_and_note(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        begin_client(self, vllm_config)

    return init_and_note


def begin_client(client: Any, vllm_config: Any) -> None:
    """Prepare for the requests of a client of the engine: open the store, and note what it is told of the model.

    Args:
        client: vLLM's `AsyncLLM` or `LLMEngine`.
    """
    contained("reading the logprobs' mode", _note_logprobs_mode, client, vllm_config)
    # Not with the first generation: run-batch may end right after that, before the store is open. Before the model
    # is known, whose vocabulary may take a second to read: it follows.
    contained("opening the store", start, SECONDS_TO_REGISTER)
    contained("reading which model is served", _note_engine, client, vllm_config)


def record_offline(engine: Any) -> None:
    """Record what an `LLMEngine` generates from here on."""
    _offline[engine.output_processor] = hasattr(engine.engine_core, "engine_core")


def is_recorded_offline(engine: Any) -> bool:
    """Tell whether what an `LLMEngine` generates is recorded."""
    return engine.output_processor in _offline


def _note_logprobs_mode(client: Any, vllm_config: Any) -> None:
    _logprobs_modes[client.output_processor] = logprobs.mode_of(vllm_config.model_config)
    if session.is_recording:
        alternatives.warn_of_missing_masks(vllm_config.model_config)


def _note_engine(client: Any, vllm_config: Any) -> None:
    session.identity.note_engine(client.output_processor, vllm_config.model_config)


class PendingRequests:
    """The requests of one `OutputProcessor` that have not ended.

    Each stays here until it is recorded: the writing thread takes what is neither here nor in its queue for written.

    Args:
        record: called with each captured request when all its choices have ended.
        logprobs_mode: the kind of the engine's logprobs, in vLLM's words.
        note_lost: called with each captured request that our code fails to record, and the reason.
    """

    def __init__(
        self,
        record: Callable[[CapturedRequest], object],
        logprobs_mode: str | None = None,
        note_lost: Callable[[CapturedRequest, Exception], object] = lambda captured, error: None,
    ) -> None:
        self._record = record
        self._note_lost = note_lost
        self._logprobs_mode = logprobs_mode
        self._requests: dict[str, tuple[CapturedRequest, Any]] = {}
        self._parents: dict[str, CapturedRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def under_way(self) -> list[tuple[str | None, str | None]]:
        """Return the rollout and the attempt of each; for the writing thread, while others change them."""
        # Each of the two lists is made at once, as no other thread runs meanwhile.
        requests, parents = list(self._requests.values()), list(self._parents.values())
        captured = {id(each): each for each in (*(each for each, _ in requests), *parents)}
        return [each.whose() for each in captured.values()]

    def add(
        self,
        state: Any,
        request: Any,
        parent: Any,
        context: RequestContext | None,
        replaced: Mapping[str, Any] | None = None,
    ) -> None:
        """Follow a request that vLLM has just registered; with n > 1, vLLM makes it of `parent`.

        Args:
            replaced: what was asked for in place of what was pinned, where the context does not say.
        """
        if parent is None:
            captured = self._capture(name_of(request), request, request.sampling_params, context)
        elif parent.request_id in self._parents:
            captured = self._parents[parent.request_id]
        else:
            captured = self._capture(name_of(parent), request, parent.sampling_params, context, parent.n)
            self._parents[parent.request_id] = captured
        captured.replaced = captured.replaced or replaced
        if captured.prompt_logprobs is None:
            captured.prompt_logprobs = state.logprobs_processor.prompt_logprobs
        # From 0.28. The recording alone wants them.
        if session.is_recording and hasattr(state, "sampling_mask_chunks"):
            state.sampling_mask_chunks = alternatives.MaskChunks()
        captured.unfinished += 1
        self._requests[request.request_id] = (captured, state)

    def _capture(
        self, name: str, request: Any, params: Any, context: RequestContext | None, n: int = 1
    ) -> CapturedRequest:
        prompt = prompt_ids_of(request)
        return CapturedRequest(name, request.arrival_time, prompt, params, context, self._logprobs_mode, n)

    def finish(self, output: Any, returned: Mapping[str, Any] | None = None) -> None:
        """Note that the engine is done with a request.

        Args:
            output: its last `EngineCoreOutput`.
            returned: what an offline engine returns in this step, by request.
        """
        if output.request_id not in self._requests:
            return
        captured, state = self._requests[output.request_id]
        try:
            self._finish(output, captured, state, returned or {})
        except Exception as error:
            self._note_lost(captured, error)
            # A choice is missing, so the request would stay under way for ever.
            self._forget_parent(state)
            raise
        finally:
            del self._requests[output.request_id]

    def _finish(self, output: Any, captured: CapturedRequest, state: Any, returned: Mapping[str, Any]) -> None:
        last = _last_completion(state, returned.get(captured.name))
        if last is not None:
            experts = _routed_experts(state, last)
            choice = FinishedChoice(state, last.finish_reason, last.stop_reason, experts, _masks(state))
        else:
            # The engine gives no reason where vLLM's detokenizer has found a stop string.
            reason = "stop" if output.finish_reason is None else str(output.finish_reason)
            experts = _routed_experts(state, None)
            choice = FinishedChoice(state, reason, output.stop_reason, experts, _masks(state))
        captured.unfinished -= 1
        captured.finished.append(choice)
        if len(captured.finished) == captured.n:
            self._close(captured)

    def end(self, request_ids: Iterable[str], finish_reason: str) -> None:
        """Note that these requests end early: their client is gone (`"abort"`), or the engine failed (`"error"`)."""
        ended: dict[str, None] = {}
        closing: list[CapturedRequest] = []
        try:
            for request_id in request_ids:
                if request_id in ended or request_id not in self._requests:
                    continue
                captured, state = self._requests[request_id]
                ended[request_id] = None
                captured.unfinished -= 1
                experts = _routed_experts(state, None)
                ended_early = FinishedChoice(state, finish_reason, routed_experts=experts, masks=_masks(state))
                captured.finished.append(ended_early)
                # With n > 1: a choice that vLLM has not registered yet will never come.
                if not captured.unfinished:
                    closing.append(captured)
        except Exception as error:
            for captured in {id(each): each for each, _ in map(self._requests.__getitem__, ended)}.values():
                self._note_lost(captured, error)
            raise
        else:
            for captured in closing:
                contained("recording a request that ended early", self._close_or_lose, captured)
        finally:
            for request_id in ended:
                del self._requests[request_id]

    def end_all(self, finish_reason: str) -> None:
        """Do the same for all requests."""
        self.end(list(self._requests), finish_reason)

    def lose_all(self, error: Exception) -> None:
        """Count all requests as lost, for this reason, and forget them."""
        requests = {id(captured): captured for captured, _ in self._requests.values()}
        for captured in requests.values():
            self._note_lost(captured, error)
        self._requests.clear()
        self._parents.clear()

    def _close(self, captured: CapturedRequest) -> None:
        try:
            self._record(captured)
        finally:
            self._forget_parent(captured.finished[0].state)

    def _close_or_lose(self, captured: CapturedRequest) -> None:
        try:
            self._close(captured)
        except Exception as error:
            self._note_lost(captured, error)
            raise

    def _forget_parent(self, state: Any) -> None:
        if state.parent_req is not None:
            self._parents.pop(state.parent_req.request_id, None)


def _close(captured: CapturedRequest) -> None:
    if session.settings.continues != "off":
        contained("keeping a call", continuation.note_finished, captured)
    if session.is_recording:
        _record(captured)


def _record(captured: CapturedRequest) -> None:
    token_ids, more = len(captured.prompt_token_ids or ()), 0
    for choice in captured.finished:
        token_ids += len(choice.state.detokenizer.token_ids)
        more += _bytes_of(choice)
    keeps_text = session.settings.record_text
    build = functools.partial(from_frontend, captured, time.time_ns(), keeps_text)
    session.record(build, token_ids, more, captured.whose)


def _note_lost(captured: CapturedRequest, error: Exception) -> None:
    if session.is_recording:
        session.recorder.note_lost(captured.whose, error)


def _bytes_of(choice: FinishedChoice) -> int:
    """Return how many bytes a finished choice keeps alive beside its ids."""
    state = choice.state
    nbytes = sum(chunk.nbytes for chunk in choice.routed_experts) if choice.routed_experts else 0
    nbytes += 0 if choice.masks is None else choice.masks.nbytes
    # Missing in some releases.
    embeds = getattr(state, "prompt_embeds", None)
    if embeds is not None:
        nbytes += embeds.nbytes
    tap = state.logprobs_processor.update_from_output
    if isinstance(tap, logprobs.LogprobsTap):
        nbytes += tap.found.itemsize * len(tap.found)
    for positions in (state.logprobs_processor.logprobs, state.logprobs_processor.prompt_logprobs):
        # The first position of a prompt has none.
        if positions:
            nbytes += BYTES_PER_LOGPROB * len(positions) * len(positions[-1] or ())
    return nbytes


def _last_completion(state: Any, returned: Any) -> Any:
    """Return the `CompletionOutput` that ended a request, which has just been put into its client's queue.

    Args:
        returned: the output of an offline engine, which has no queue.
    """
    latest = returned if state.queue is None else state.queue.output
    for output in getattr(latest, "outputs", ()):
        if output.index == state.request_index:
            return output
    # Choices that are answered together are gathered in their parent first.
    for output in getattr(state.parent_req, "output_aggregator", None) or ():
        if output is not None and output.index == state.request_index:
            return output
    return None


def _routed_experts(state: Any, last: Any) -> list[Any]:
    """Return the arrays of the experts that the ids went through, if vLLM was told to return them."""
    # Releases that do not send them with every step (0.14.1 and 0.18.1, as read) send them with the last output.
    chunks = getattr(state, "routed_experts_chunks", None)
    if chunks is None:
        whole = getattr(last, "routed_experts", None)
        chunks = [] if whole is None else [whole]
    return chunks


def _masks(state: Any) -> alternatives.StepMasks | None:
    """Return what the ids were chosen from, if vLLM was told to return it."""
    chunks = getattr(state, "sampling_mask_chunks", None)
    if not isinstance(chunks, alternatives.MaskChunks):
        return None
    # vLLM has made its last output; until the generation is written, they would keep the engine's messages in memory.
    chunks.clear()
    return chunks.masks


def _follows(module: ModuleType) -> bool:
    return session.follows_requests


def _records(module: ModuleType) -> bool:
    return session.is_recording


CAPTURE_PATCHES: tuple[Patch, ...] = (
    Wrap("OutputProcessor.add_request", ("request", "prompt", "parent_req"), wrap_add_request),
    Where(
        _follows,
        Wrap("OutputProcessor.process_outputs", ("engine_core_outputs",), wrap_process_outputs, is_frequent=True),
    ),
    Where(_follows, Wrap("OutputProcessor.abort_requests", ("request_ids",), wrap_abort_requests)),
    Where(_follows, Wrap("OutputProcessor.propagate_error", (), wrap_propagate_error)),
)
CLIENT_PATCHES: tuple[Patch, ...] = (Where(_records, Wrap("AsyncLLM.__init__", ("vllm_config",), wrap_client_init)),)
