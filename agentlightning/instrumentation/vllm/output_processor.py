"""The capture: where token ids are born, each request to the engine is tied to the HTTP request that it is for.

A request ends in one of three ways, each a method of vLLM's `OutputProcessor`: the engine is done with it
(`process_outputs`), nobody waits for it any more (`abort_requests`), or the engine is dead (`propagate_error`). Only
where generations are kept are these followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentlightning import settings
from agentlightning.instrumentation.vllm import logprobs, marks, recording, request_context, running, senders
from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.instrumentation.vllm.records import prompt_ids_of
from agentlightning.instrumentation.vllm.request_context import EngineRequest, RequestContext
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["CAPTURE_PATCHES", "CLIENT_PATCHES"]


def tied(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.add_request`, which runs once for each request to the engine."""
    records, asks = recording.is_on(), settings.logprobs()

    def add_request_and_tie(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        context = request_context.current()
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
    name = running.name_of(request)
    context.engine_requests.append(EngineRequest(name, prompt_ids_of(request), state.detokenizer))


def _note(
    processor: Any, state: Any, request: Any, parent_req: Any, context: RequestContext | None, asks: bool
) -> None:
    mark = marks.Mark.RECORDED
    # An offline LLM has no queue. Where more input comes in between (realtime), it is no prompt and its answer.
    if state.queue is not None and not getattr(request, "resumable", False):
        running.running(processor).add(state, request, parent_req, context)
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
    under_way = running.under_way(processor)
    if under_way is not None:
        states = processor.request_states
        for ended in [output for output in engine_core_outputs if output.request_id not in states]:
            contained("recording what ended", under_way.finish, ended)


def aborting(abort_requests: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.abort_requests`, which answers with the ids of those that it has ended."""

    def abort_requests_and_give_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = abort_requests(self, *args, **kwargs)
        under_way = running.under_way(self)
        if under_way is not None:
            contained("recording an abort", under_way.give_up, aborted, "abort")
        return aborted

    return abort_requests_and_give_up


def failing(propagate_error: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.propagate_error`: the engine is dead, and with it all that is under way."""

    def propagate_error_and_give_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        under_way = running.under_way(self)
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
        contained("opening the store", running.start)

    return init_and_tell


def _note_mode(client: Any, vllm_config: Any) -> None:
    running.note_logprobs_mode(client.output_processor, logprobs.mode_of(vllm_config.model_config))


def _note_engine(client: Any, vllm_config: Any) -> None:
    senders.note_engine(client.output_processor, vllm_config.model_config)


def _records(module: object) -> bool:
    return recording.is_on()


CAPTURE_PATCHES: tuple[Patch, ...] = (
    Wrap("OutputProcessor.add_request", ("request", "prompt", "parent_req"), tied),
    Where(_records, Wrap("OutputProcessor.process_outputs", ("engine_core_outputs",), finishing)),
    Where(_records, Wrap("OutputProcessor.abort_requests", ("request_ids",), aborting)),
    Where(_records, Wrap("OutputProcessor.propagate_error", (), failing)),
)
CLIENT_PATCHES: tuple[Patch, ...] = (Where(_records, Wrap("AsyncLLM.__init__", ("vllm_config",), knowing_the_engine)),)
