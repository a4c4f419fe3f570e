"""Calls that a program makes in vLLM's own process, of `AsyncLLM`, `LLMEngine` and the offline `LLM`: their rollouts.

A rollout is named by the innermost block of `agl.rollout` or `agl.rollouts` that the call is made in, the HTTP request
that the program is answering, the call's `trace_headers`, which are read as the headers of an HTTP request, or the
request id: `agl/ROLLOUT[/ATTEMPT[/AGENT]]/anything`. `_carriers.follow` knows their order.

An offline `LLM` is recorded where `AGL_RECORD_OFFLINE` is on, by the same capture as a server's requests.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from types import ModuleType
from typing import Any

import agentlightning
from agentlightning.instrumentation.vllm import _context, _releases
from agentlightning.instrumentation.vllm._carriers import Caller, conflicting_names, follow, ignored_ids, read_headers
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import frontend
from agentlightning.instrumentation.vllm.capture.identity import served_name
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap
from agentlightning.rollout_name import RolloutName, current_block, outside_of_blocks, parse_name, rollout, rollouts

__all__ = ["CLIENT_PATCHES", "ENGINE_PATCHES", "OFFLINE_PATCHES", "begin"]

logger = logging.getLogger("agentlightning")

Names = Iterator[RolloutName | None]

_OF_TRACES = (b"traceparent", b"tracestate")

_names: ContextVar[Names | None] = ContextVar("agentlightning.names", default=None)
"""Within a call of an offline `LLM`: the name of each request that it makes, in order."""


def wrap_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.generate`, whose generator makes its request in the context of who iterates over it."""

    def generate_in_block(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = current_block()
        # Checked here, since vLLM's generator would turn the error into one of the engine.
        _only_name(block)
        stream = generate(self, *args, **kwargs)
        # An answer over HTTP is iterated over where it is called, and each layer costs time for each of its chunks.
        is_plain = block is None and _context.current() is not None
        return stream if is_plain else _begin_in_block(block, stream)

    return generate_in_block


async def _begin_in_block(
    block: rollout | rollouts | None, stream: AsyncGenerator[Any, None]
) -> AsyncGenerator[Any, None]:
    """Yield the stream's items, the first made in the block of the call, or in none."""
    async with aclosing(stream):
        with outside_of_blocks() if block is None else block:
            first = await anext(stream, None)
        if first is not None:
            yield first
        async for item in stream:
            yield item


def wrap_async_add_request(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.add_request`, which makes one request."""
    describe = _Describer("AsyncLLM.generate", add_request)

    async def name_and_add_request(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        if contained("telling what a call wants", describe.is_pooling, args, kwargs):
            return await add_request(self, request_id, *args, **kwargs)
        name = _only_name(current_block())
        context = contained("naming a call", describe, name, self, request_id, *args, **kwargs)
        if context is None:
            return await add_request(self, request_id, *args, **kwargs)
        return await _context.run_in(context, lambda: add_request(self, request_id, *args, **kwargs))

    return name_and_add_request


def wrap_add_request(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LLMEngine.add_request`, which makes one request, for an offline `LLM` or for a program."""
    describe = _Describer("LLMEngine.add_request", add_request)

    def name_and_add_request(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        if contained("telling what a call wants", describe.is_pooling, args, kwargs):
            return add_request(self, request_id, *args, **kwargs)
        contained("beginning to record an offline engine", _begin_late, self)
        names = _names.get()
        name = _only_name(current_block()) if names is None else next(names, None)
        context = contained("naming a call", describe, name, self, request_id, *args, **kwargs)
        if context is None:
            return add_request(self, request_id, *args, **kwargs)
        return _context.call_in(context, add_request, self, request_id, *args, **kwargs)

    return name_and_add_request


def _only_name(block: rollout | rollouts | None) -> RolloutName | None:
    """Return the name that a block has for a single request.

    Raises:
        ValueError: the block has names for the prompts of a batch.
    """
    if not isinstance(block, rollouts):
        return None if block is None else block.name
    if len(block.names) != 1:
        raise ValueError(
            f"agl.rollouts has names for {len(block.names)} prompts of one call of vLLM's LLM, but this is a single "
            "request: use agl.rollout for each"
        )
    return block.names[0]


class _Describer:
    """Describe requests to an engine as `RequestContext`s.

    Args:
        endpoint: for requests of no other call.
        add_request: the method that makes them.
    """

    def __init__(self, endpoint: str, add_request: Callable[..., Any]) -> None:
        self._endpoint = endpoint
        # Behind `self` and the request's id.
        self._places = {name: place - 2 for place, name in enumerate(inspect.signature(add_request).parameters)}

    def is_pooling(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Tell whether a request generates nothing, as those of `LLM.embed`: a block may have names for its prompts."""
        from vllm.pooling_params import PoolingParams

        return isinstance(self._argument(args, kwargs, "params"), PoolingParams)

    def __call__(
        self, name: RolloutName | None, engine: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> RequestContext | None:
        """Return the context of a request; None where the present one says all."""
        argument = functools.partial(self._argument, args, kwargs)
        # By itself: a program's mistake in them costs no more than them.
        trace_headers = contained("reading trace headers", _encoded, argument("trace_headers")) or {}
        present, is_offline = _context.current(), _names.get() is not None
        if present is not None:
            # vLLM's endpoints hand on those of the HTTP request, which have been read.
            trace_headers = {name: value for name, value in trace_headers.items() if name not in _OF_TRACES}
        if name is None and not trace_headers:
            if present is None and _releases.serves_grpc():
                return None  # The ids of such requests have another form: `request_names` reads them.
            if present is not None and not is_offline and not request_id.startswith("agl/"):
                return None
        context = RequestContext(endpoint=self._endpoint) if present is None else _copy(present)
        if present is None or is_offline:
            lora = argument("lora_request")
            context.model = served_name(engine.model_config) if lora is None else lora.lora_name
            # vLLM keeps the whole text of a prompt whose ids it cuts.
            if argument("tokenization_kwargs") or getattr(argument("params"), "truncate_prompt_tokens", None):
                context.text_limit = 0
        ignored, conflicts = len(ignored_ids), len(conflicting_names)
        _read(name, trace_headers, request_id, context)
        _log_new_kinds(ignored, conflicts)
        return context

    def _argument(self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
        place = self._places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)


def _copy(context: RequestContext) -> RequestContext:
    # Make the call's id first, so that both contexts have it.
    _ = context.call_id
    return copy(context)


def _encoded(trace_headers: Mapping[str, str] | None) -> dict[bytes, bytes]:
    """Return headers as those of an HTTP request are."""
    return {name.lower().encode(): value.encode() for name, value in (trace_headers or {}).items()}


def _read(
    name: RolloutName | None, trace_headers: Mapping[bytes, bytes], request_id: str, context: RequestContext
) -> None:
    """Note whose a request is: by its block, by what the context has of HTTP, and by its own arguments."""
    if name is not None:
        follow(context, "block", name)
        # Before that of any header, which comes before that of a carrier.
        context.agent_id = name.agent_id or context.agent_id
    if trace_headers:
        of_headers = Caller()
        read_headers(trace_headers, None, of_headers)
        named = RolloutName(of_headers.rollout_id, of_headers.attempt_id, of_headers.carrier_agent_id)
        follow(context, "trace_headers", named)
        for field in ("session_id", "agent_id", "parent_agent_id", "purpose", "retry", "trace_id"):
            if getattr(context, field) is None:
                setattr(context, field, getattr(of_headers, field))
    in_id = parse_name(request_id)
    if in_id is not None:
        follow(context, "request_id", in_id)


def _log_new_kinds(ignored: int, conflicts: int) -> None:
    """Log what has been ignored for the first time, since a program without an app has no status to read.

    Args:
        ignored, conflicts: how many kinds had been counted before.
    """
    for source in [*ignored_ids][ignored:]:
        logger.warning("agentlightning: an id in %s is not valid, so it is ignored; this is logged once", source)
    for source in [*conflicting_names][conflicts:]:
        logger.warning(
            "agentlightning: a call names one rollout or attempt, and by its %s another, which is ignored; this is "
            "logged once",
            source,
        )


def wrap_call(endpoint: str, parameter: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the wrapper of a method of `LLM` that makes a request of each prompt.

    Args:
        endpoint: what the recording calls it.
        parameter: the one that takes the prompts.
    """
    is_search = endpoint == "LLM.beam_search"

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(call)

        def call_with_names(self: Any, *args: Any, **kwargs: Any) -> Any:
            # A method that vLLM builds upon another: `chat` calls `generate` in some releases.
            if _names.get() is not None:
                return call(self, *args, **kwargs)
            names = _names_of(current_block(), signature, parameter, is_search, self, *args, **kwargs)
            present = _context.current()
            context = RequestContext(endpoint=endpoint) if present is None else _copy(present)
            # A search appends to the ids of a prompt alone, and vLLM keeps the whole text of one whose ids it cuts.
            if is_search or kwargs.get("tokenization_kwargs"):
                context.text_limit = 0
            token = _names.set(names)
            try:
                return _context.call_in(context, call, self, *args, **kwargs)
            finally:
                _names.reset(token)

        return call_with_names

    return wrap


def _names_of(
    block: rollout | rollouts | None,
    signature: inspect.Signature,
    parameter: str,
    is_search: bool,
    *args: Any,
    **kwargs: Any,
) -> Names:
    """Return the name of each request of a call.

    Raises:
        ValueError: the block has names for another number of prompts, or for those of a search.
    """
    if not isinstance(block, rollouts):
        return itertools.repeat(None if block is None else block.name)
    arguments = signature.bind(*args, **kwargs).arguments
    # Up to 0.10, ids may come by a parameter of their own.
    prompts = arguments.get(parameter)
    if prompts is None:
        prompts = arguments.get("prompt_token_ids") or ()
    count = _count(prompts, of_one=Mapping if parameter == "messages" else int)
    if count != len(block.names):
        raise ValueError(f"agl.rollouts has names for {len(block.names)} prompts, but this call has {count}")
    if not is_search:
        return iter(block.names)
    if count > 1:
        raise ValueError(
            "vLLM searches the beams of all prompts together, so agl.rollouts cannot name them: call beam_search for "
            "each prompt, in agl.rollout"
        )
    return itertools.repeat(block.names[0])


def _count(prompts: Any, of_one: type) -> int:
    """Count prompts as vLLM does.

    Args:
        prompts: several in a sequence, or a single one.
        of_one: what the elements of a single prompt are: ids or messages.
    """
    if isinstance(prompts, str | bytes | Mapping):
        return 1
    is_one = len(prompts) > 0 and all(isinstance(each, of_one) for each in prompts)
    return 1 if is_one else len(prompts)


def wrap_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LLMEngine.__init__`: note whether what it generates is recorded, and say so."""

    def init_and_begin(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        contained("beginning to record an offline engine", begin, self, vllm_config)

    return init_and_begin


def begin(engine: Any, vllm_config: Any) -> None:
    """Record what an `LLMEngine` generates, if it is to be, and log which it is."""
    if vllm_config.model_config.runner_type == "pooling" or _repeats_another(vllm_config.parallel_config):
        return
    if not session.records_offline:
        logger.info("agentlightning: this offline LLM is not recorded, since AGL_RECORD_OFFLINE is off")
        return
    frontend.begin_client(engine, vllm_config)
    frontend.record_offline(engine)
    logger.info(
        "agentlightning: release %s is on; this offline LLM %s",
        agentlightning.__version__,
        session.destination(),
    )


def _begin_late(engine: Any) -> None:
    """Begin with an engine that the program has made before it was instrumented."""
    if not frontend.is_recorded_offline(engine):
        begin(engine, engine.vllm_config)


def _repeats_another(parallel_config: Any) -> bool:
    """Tell whether an engine generates what another process records: torchrun starts one for each rank of a model."""
    if getattr(parallel_config, "distributed_executor_backend", None) != "external_launcher":
        return False
    return int(os.environ.get("RANK", "0")) % parallel_config.world_size != 0


def wrap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LLMEngine.step`, which raises where the engine has failed."""

    def step_or_record_failure(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(self, *args, **kwargs)
        except Exception:
            pending = frontend.find_pending(self.output_processor)
            if pending is not None:
                contained("recording requests that the engine failed", pending.end_all, "error")
            raise

    return step_or_record_failure


def _records(module: ModuleType) -> bool:
    return session.is_recording


def _records_offline(module: ModuleType) -> bool:
    return session.records_offline


def _has(name: str) -> Callable[[ModuleType], bool]:
    return lambda module: _records_offline(module) and hasattr(module.LLM, name)


CLIENT_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("AsyncLLM.generate", ("request_id",), wrap_generate)),
    Where(_records, Wrap("AsyncLLM.add_request", ("request_id", "trace_headers"), wrap_async_add_request)),
)
ENGINE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("LLMEngine.__init__", ("vllm_config",), wrap_init)),
    Where(_records_offline, Wrap("LLMEngine.add_request", ("request_id", "trace_headers"), wrap_add_request)),
    Where(_records_offline, Wrap("LLMEngine.step", (), wrap_step)),
)
OFFLINE_PATCHES: tuple[Patch, ...] = (
    Where(_records_offline, Wrap("LLM.generate", ("prompts",), wrap_call("LLM.generate", "prompts"))),
    Where(_records_offline, Wrap("LLM.chat", ("messages",), wrap_call("LLM.chat", "messages"))),
    Where(_records_offline, Wrap("LLM.beam_search", ("prompts",), wrap_call("LLM.beam_search", "prompts"))),
    Where(_has("enqueue"), Wrap("LLM.enqueue", ("prompts",), wrap_call("LLM.enqueue", "prompts"))),
    Where(_has("enqueue_chat"), Wrap("LLM.enqueue_chat", ("messages",), wrap_call("LLM.enqueue_chat", "messages"))),
)
