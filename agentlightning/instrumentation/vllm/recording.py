"""From the capture to the recorder: what a request to the engine consumed and produced becomes a `Generation`.

On the event loop a generation costs the same however long it is: vLLM's lists are taken as they are, and the thread
that writes makes of them what is kept.
"""

from __future__ import annotations

import atexit
import functools
import json
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from agentlightning import settings
from agentlightning.generation import Choice, Generation, Status
from agentlightning.instrumentation.vllm import request_context
from agentlightning.instrumentation.vllm.metrics import Metrics
from agentlightning.instrumentation.vllm.request_context import RequestContext
from agentlightning.instrumentation.vllm.running import Ended, Record, Running
from agentlightning.patching import Patch, Where, Wrap
from agentlightning.recorder import Recorder

__all__ = ["calls", "give_up_all", "is_on", "recorder", "report", "running", "start", "under_way"]

# An integer of Python's, and its place in a list.
BYTES_PER_ID = 36
# What else a record holds on to.
BYTES_PER_RECORD = 2000

# Sampling parameters in which a client says what a text is to have or not to have.
TEXTS = ("stop", "bad_words", "structured_outputs", "extra_args")

_running: WeakKeyDictionary[Any, Running] = WeakKeyDictionary()


def is_on() -> bool:
    """Whether generations are kept: `AGL_STORE` is set."""
    return settings.store() is not None


@functools.cache
def recorder() -> Recorder:
    """This process's recorder, where generations are kept."""
    url = settings.store()
    assert url is not None, "asked for where nothing is kept"
    return Recorder(url, settings.queue_bytes(), observe=Metrics())


@functools.cache
def start() -> None:
    """Open the store before the first request needs it, so that what stands in its way is told when a server starts."""
    recorder().start()
    # After the recorder's own, and so called before it: what is under way then is kept too.
    atexit.register(give_up_all)


def report() -> dict[str, Any] | None:
    """For the status: where generations are kept, and what has become of them; None where they are not kept."""
    if not is_on():
        return None
    return {"store": settings.without_secrets(settings.store() or ""), **asdict(recorder().counters())}


def calls(target: str, endpoint: str) -> Patch:
    """The patch of an endpoint's `create_*` method that makes all requests to the engine those of one call.

    Args:
        target: the method, as `Wrap` takes it.
        endpoint: the path of its route, for calls that come on none, as in run-batch.
    """

    def with_a_call(create: Callable[..., Any]) -> Callable[..., Any]:
        async def create_in_a_call(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            context = request_context.current() or RequestContext(endpoint=endpoint)
            # The endpoint that is built upon another has said it already.
            context.model = context.model or getattr(request, "model", None)
            return await request_context.opened(lambda: create(serving, request, *args, **kwargs), context)

        return create_in_a_call

    return Where(lambda module: is_on(), Wrap(target, ("request",), with_a_call))


def running(processor: Any) -> Running:
    """What is under way in one of vLLM's `OutputProcessor`s, from its first request on."""
    found = _running.get(processor)
    if found is None:
        start()
        found = _running[processor] = Running(_keep)
    return found


def under_way(processor: Any) -> Running | None:
    """The same where there has been a request that is kept: in an offline LLM there is none."""
    return _running.get(processor)


def give_up_all() -> None:
    """The server ends: what is under way ends with it."""
    for each in list(_running.values()):
        each.give_up_all("abort")


def _keep(record: Record) -> None:
    prompt = len(record.request.prompt_token_ids or ())
    response = sum(len(ended.state.detokenizer.token_ids) for ended in record.ended)
    nbytes = BYTES_PER_RECORD + BYTES_PER_ID * (prompt + response)
    recorder().record(functools.partial(_generation, record, time.time_ns()), nbytes)


def _generation(record: Record, finished_at: int) -> Generation:
    state, context = record.ended[0].state, record.context or RequestContext()
    keeps_text = settings.record_text()
    prompt_token_ids = state.prompt_token_ids
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
        started_at=int(record.request.arrival_time * 1e9),
        first_token_at=_first_token_at(state),
        finished_at=finished_at,
        status=_status(record),
        # A prompt of embeddings has none.
        prompt_token_ids=array("i", prompt_token_ids) if prompt_token_ids else None,
        prompt_text=state.prompt if keeps_text else None,
        sampling_params=_as_json(record.sampling_params, keeps_text),
        cached_tokens=getattr(state, "num_cached_tokens", None),
        choices=sorted((_choice(ended, keeps_text) for ended in record.ended), key=lambda choice: choice.index),
    )


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
        weight_versions=[(span.version, span.start, span.end) for span in ended.weight_versions or ()] or None,
    )


def _logprobs(state: Any, token_ids: array[int]) -> array[float] | None:
    """Those of the sampled ids, where the client asked vLLM for any; one an id, or none at all."""
    positions = state.logprobs_processor.logprobs
    if not positions or len(positions) != len(token_ids):
        return None
    return array("f", (position[token_id].logprob for position, token_id in zip(positions, token_ids, strict=True)))


def _status(record: Record) -> Status:
    reasons = {ended.finish_reason for ended in record.ended}
    return "error" if "error" in reasons else "aborted" if "abort" in reasons else "finished"


def _response_id(record: Record, context: RequestContext) -> str:
    """The `id` of the answer: vLLM leaves it in the HTTP request's state; without one, the engine's name has it."""
    metadata = (context.scope or {}).get("state", {}).get("request_metadata")
    if metadata is not None:
        return metadata.request_id
    # Each prompt of a completions request has its number behind it.
    return record.name.rpartition("-")[0] if record.name.startswith("cmpl-") else record.name


def _first_token_at(state: Any) -> int | None:
    # Without --disable-log-stats, and from 0.10.2.
    latency = getattr(state.stats, "first_token_latency", 0.0)
    return int((state.stats.arrival_time + latency) * 1e9) if latency else None


def _as_json(sampling_params: Any, keeps_text: bool) -> str:
    import msgspec  # vLLM's own: its parameters are a Struct that leaves out defaults.

    return _said(msgspec.json.encode(sampling_params, enc_hook=repr), keeps_text)


# An agent's calls mostly have the same ones.
@functools.lru_cache(1_000)
def _said(sampling_params: bytes, keeps_text: bool) -> str:
    said = {
        name: value
        for name, value in json.loads(sampling_params).items()
        if _is_said(name) and (keeps_text or name not in TEXTS)
    }
    return json.dumps(said, separators=(",", ":"))


def _is_said(name: str) -> bool:
    # The others are how vLLM works with them: what it has derived, and how it hands out and copies results.
    return not name.startswith("_") and name not in ("output_kind", "skip_clone")
