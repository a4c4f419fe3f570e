"""The capture: where token ids are born, each request to the engine is tied to the HTTP request that it is for.

A request ends in one of three ways, each a method of vLLM's `OutputProcessor`: the engine is done with it
(`process_outputs`), nobody waits for it any more (`abort_requests`), or the engine is dead (`propagate_error`). Only
where generations are kept are these followed.
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from agentlightning import settings
from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._context import EngineRequest, RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import logprobs, marks, session
from agentlightning.instrumentation.vllm.capture.conversion import Ended, Record, generation_of, prompt_ids_of
from agentlightning.patching import Patch, Where, Wrap

__all__ = [
    "CAPTURE_PATCHES",
    "CLIENT_PATCHES",
    "Running",
    "find_running",
    "forget_all",
    "give_up_all",
    "name_of",
    "note_logprobs_mode",
    "running",
    "start",
]


def tied(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.add_request`, which runs once for each request to the engine."""
    records, asks = session.is_on(), settings.logprobs()

    def add_request_and_tie(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        context = _context.current()
        collects = context is not None and context.collects
        if not (collects or records):
            return add_request(self, request, prompt, parent_req, *args, **kwargs)
        # More input for a request that is known already (realtime) comes the same way.
        is_new = contained("looking for a request", _is_new, self, request)
        answer = add_request(self, request, prompt, parent_req, *args, **kwargs)
        state = contained("finding a request", _state_of, self, request) if is_new else None
        if state is not None:
            if context is not None and collects:
                contained("capturing a request", _tie, state, request, context)
            if records:
                contained("recording a request", _note, self, state, request, parent_req, context, asks)
        return answer

    return add_request_and_tie


def _is_new(processor: Any, request: Any) -> bool:
    return request.request_id not in processor.request_states


def _state_of(processor: Any, request: Any) -> Any:
    """vLLM's state of a request; None of a pooling request, which has no detokenizer, and gives out no ids."""
    state = processor.request_states[request.request_id]
    return None if state.detokenizer is None else state


def _tie(state: Any, request: Any, context: RequestContext) -> None:
    name = name_of(request)
    context.engine_requests.append(EngineRequest(name, prompt_ids_of(request), state.detokenizer))


def _note(
    processor: Any, state: Any, request: Any, parent_req: Any, context: RequestContext | None, asks: bool
) -> None:
    mark = marks.Mark.RECORDED
    # An offline LLM has no queue. Where more input comes in between (realtime), it is no prompt and its answer.
    if state.queue is not None and not getattr(request, "resumable", False):
        running(processor).add(state, request, parent_req, context)
        if asks and not logprobs.are_wanted(request.sampling_params):
            state.logprobs_processor.update_from_output = logprobs.Taking(state.logprobs_processor)
            logprobs.ask_for_them(request)
            mark = marks.Mark.RECORDED_WITH_LOGPROBS
    # vLLM sends it to the engine when this has returned.
    marks.add(request.request_id, mark)


def finishing(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.process_outputs`, which runs once for each step of the engine."""

    def process_outputs_and_finish(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        # An error here would end vLLM's loop, and with it the engine.
        states = getattr(self, "request_states", ())
        before = len(states)
        answer = process_outputs(self, engine_core_outputs, *args, **kwargs)
        # Most steps end nothing, and those cost the same however many requests are in them.
        if len(states) < before:
            contained("recording what ended", _finish, self, engine_core_outputs)
        return answer

    return process_outputs_and_finish


def _finish(processor: Any, engine_core_outputs: Any) -> None:
    under_way = find_running(processor)
    if under_way is not None:
        states = processor.request_states
        for ended in [output for output in engine_core_outputs if output.request_id not in states]:
            contained("recording what ended", under_way.finish, ended)


def aborting(abort_requests: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.abort_requests`, which answers with the ids of those that it has ended."""

    def abort_requests_and_give_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = abort_requests(self, *args, **kwargs)
        under_way = find_running(self)
        if under_way is not None:
            contained("recording an abort", under_way.give_up, aborted, "abort")
        return aborted

    return abort_requests_and_give_up


def failing(propagate_error: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.propagate_error`: the engine is dead, and with it all that is under way."""

    def propagate_error_and_give_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        under_way = find_running(self)
        if under_way is not None:
            contained("recording the engine's death", under_way.give_up_all, "error")
        return propagate_error(self, *args, **kwargs)

    return propagate_error_and_give_up


def knowing_the_engine(init: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `AsyncLLM.__init__`, which knows the model, its tokens, and what its logprobs will be of."""

    def init_and_tell(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        contained("reading the logprobs' mode", _note_mode, self, vllm_config)
        contained("reading which model is served", _note_engine, self, vllm_config)
        # Here and not with the first generation: run-batch may end right after that, and with it the time to open it.
        contained("opening the store", start)

    return init_and_tell


def _note_mode(client: Any, vllm_config: Any) -> None:
    note_logprobs_mode(client.output_processor, logprobs.mode_of(vllm_config.model_config))


def _note_engine(client: Any, vllm_config: Any) -> None:
    session.note_engine(client.output_processor, vllm_config.model_config)


def _records(module: object) -> bool:
    return session.is_on()


CAPTURE_PATCHES: tuple[Patch, ...] = (
    Wrap("OutputProcessor.add_request", ("request", "prompt", "parent_req"), tied),
    Where(_records, Wrap("OutputProcessor.process_outputs", ("engine_core_outputs",), finishing)),
    Where(_records, Wrap("OutputProcessor.abort_requests", ("request_ids",), aborting)),
    Where(_records, Wrap("OutputProcessor.propagate_error", (), failing)),
)
CLIENT_PATCHES: tuple[Patch, ...] = (Where(_records, Wrap("AsyncLLM.__init__", ("vllm_config",), knowing_the_engine)),)


# What is under way in one server process: requests to the engine, from when vLLM knows them to how they ended.

logger = logging.getLogger("agentlightning")

# An object of vLLM's for one logprob that a client has asked for, with its text and its place in a dictionary.
BYTES_PER_LOGPROB = 300

_running: WeakKeyDictionary[Any, Running] = WeakKeyDictionary()
_logprobs_modes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@functools.cache
def start() -> None:
    """Open the store before the first request needs it, so that what stands in its way is told when a server starts."""
    session.recorder().start()
    # After the recorder's own, and so called before it: what is under way then is kept too.
    atexit.register(give_up_all)


def running(processor: Any) -> Running:
    """What is under way in one of vLLM's `OutputProcessor`s, from its first request on."""
    found = _running.get(processor)
    if found is None:
        start()
        found = _running[processor] = Running(_keep, _logprobs_modes.get(processor))
    return found


def find_running(processor: Any) -> Running | None:
    """The same where there has been a request that is kept: in an offline LLM there is none."""
    return _running.get(processor)


def note_logprobs_mode(processor: Any, mode: str) -> None:
    """Say what the logprobs are of, in vLLM's words, that one of vLLM's `OutputProcessor`s will see."""
    _logprobs_modes[processor] = mode


def give_up_all() -> None:
    """The server ends: what is under way ends with it."""
    for each in list(_running.values()):
        each.give_up_all("abort")


def forget_all() -> None:
    """Record nothing of what is under way: how it ends will not be seen, since the patches are taken off."""
    count = sum(len(each) for each in _running.values())
    if count:
        logger.warning("agentlightning: %d requests under way are not recorded: the patches were taken off", count)
    _running.clear()


def _keep(record: Record) -> None:
    token_ids, more = len(record.prompt_token_ids or ()), 0
    for ended in record.ended:
        token_ids += len(ended.state.detokenizer.token_ids)
        more += _bytes_of(ended)
    session.keep(functools.partial(generation_of, record, time.time_ns()), token_ids, more)


def _bytes_of(ended: Ended) -> int:
    """What else a request that has ended holds on to."""
    state = ended.state
    nbytes = sum(chunk.nbytes for chunk in ended.routed_experts) if ended.routed_experts else 0
    # Not in every release.
    embeds = getattr(state, "prompt_embeds", None)
    if embeds is not None:
        nbytes += embeds.nbytes
    taking = state.logprobs_processor.update_from_output
    if isinstance(taking, logprobs.Taking):
        nbytes += logprobs.BYTES_PER_PART * len(taking.parts)
    for positions in (state.logprobs_processor.logprobs, state.logprobs_processor.prompt_logprobs):
        # The first position of a prompt has none.
        if positions:
            nbytes += BYTES_PER_LOGPROB * len(positions) * len(positions[-1] or ())
    return nbytes


def name_of(request: Any) -> str:
    """The id that the frontend gave a request to the engine: from 0.14 vLLM appends eight characters to it."""
    return getattr(request, "external_req_id", None) or request.request_id


class Running:
    """The requests of one `OutputProcessor` that have not ended.

    Args:
        keep: is given each record when it is complete.
        logprobs_mode: what the engine's logprobs are of, in vLLM's words.
    """

    def __init__(self, keep: Callable[[Record], object], logprobs_mode: str | None = None) -> None:
        self._keep = keep
        self._logprobs_mode = logprobs_mode
        self._requests: dict[str, tuple[Record, Any]] = {}
        self._parents: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, state: Any, request: Any, parent: Any, context: RequestContext | None) -> None:
        """Note a request when vLLM does; `parent` is that of the requests that it makes of one with n > 1."""
        if parent is None:
            record = self._record(name_of(request), request, request.sampling_params, context)
        elif parent.request_id in self._parents:
            record = self._parents[parent.request_id]
        else:
            record = self._record(name_of(parent), request, parent.sampling_params, context, parent.n)
            self._parents[parent.request_id] = record
        record.open += 1
        self._requests[request.request_id] = (record, state)

    def _record(self, name: str, request: Any, params: Any, context: RequestContext | None, n: int = 1) -> Record:
        prompt = prompt_ids_of(request)
        return Record(name, request.arrival_time, prompt, params, context, self._logprobs_mode, n)

    def finish(self, output: Any) -> None:
        """The engine is done with a request: `output` is its last `EngineCoreOutput`."""
        if output.request_id not in self._requests:
            return
        record, state = self._requests.pop(output.request_id)
        last = _last_output(state)
        if last is not None:
            ended = Ended(state, last.finish_reason, last.stop_reason, _routed_experts(state, last))
        else:
            # Without a reason of the engine's, vLLM has found a stop string.
            reason = "stop" if output.finish_reason is None else str(output.finish_reason)
            ended = Ended(state, reason, output.stop_reason, _routed_experts(state, None))
        record.open -= 1
        record.ended.append(ended)
        if len(record.ended) == record.n:
            self._close(record)

    def give_up(self, request_ids: Iterable[str], finish_reason: str) -> None:
        """Nobody waits for these requests any more (`"abort"`), or nobody works on them (`"error"`)."""
        closing: list[Record] = []
        for request_id in request_ids:
            if request_id in self._requests:
                record, state = self._requests.pop(request_id)
                record.open -= 1
                record.ended.append(Ended(state, finish_reason, routed_experts=_routed_experts(state, None)))
                # What vLLM has not registered by now of one with n > 1 never comes.
                if not record.open:
                    closing.append(record)
        for record in closing:
            contained("recording what was given up", self._close, record)

    def give_up_all(self, finish_reason: str) -> None:
        """The same for all of them."""
        self.give_up(list(self._requests), finish_reason)

    def _close(self, record: Record) -> None:
        parent = record.ended[0].state.parent_req
        if parent is not None:
            self._parents.pop(parent.request_id, None)
        self._keep(record)


def _last_output(state: Any) -> Any:
    """The `CompletionOutput` that ended a request: it has just been put where who waits for it takes it from."""
    for output in getattr(state.queue.output, "outputs", ()):
        if output.index == state.request_index:
            return output
    # Several that are answered as one are put together first.
    for output in getattr(state.parent_req, "output_aggregator", None) or ():
        if output is not None and output.index == state.request_index:
            return output
    return None


def _routed_experts(state: Any, last: Any) -> list[Any]:
    """The arrays of the experts that the ids went through, where vLLM was told to return them."""
    # Before they came with every step (as read, in 0.14.1 and 0.18.1), they came with the last output.
    chunks = getattr(state, "routed_experts_chunks", None)
    if chunks is None:
        whole = getattr(last, "routed_experts", None)
        chunks = [] if whole is None else [whole]
    return chunks
