"""What is under way in one server process: requests to the engine, from when vLLM knows them to how they ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.instrumentation.vllm.request_context import RequestContext

__all__ = ["Ended", "Record", "Running", "name_of"]


def name_of(request: Any) -> str:
    """The id that the frontend gave a request to the engine: from 0.14 vLLM appends eight characters to it."""
    return getattr(request, "external_req_id", None) or request.request_id


@dataclass(slots=True)
class Ended:
    """How one request to the engine ended.

    Attributes:
        state: vLLM's `RequestState`, whose lists it does not touch any more.
        finish_reason, stop_reason, weight_versions: as vLLM's last `CompletionOutput` for it has them.
    """

    state: Any
    finish_reason: str | None
    stop_reason: int | str | None = None
    weight_versions: Any = None


@dataclass(slots=True)
class Record:
    """What becomes one generation: a request to the engine, or the `n` that vLLM makes of one."""

    name: str
    request: Any
    sampling_params: Any
    context: RequestContext | None
    n: int = 1
    open: int = 0
    ended: list[Ended] = field(default_factory=list)


class Running:
    """The requests of one `OutputProcessor` that have not ended.

    Args:
        keep: is given each record when it is complete.
    """

    def __init__(self, keep: Callable[[Record], object]) -> None:
        self._keep = keep
        self._requests: dict[str, tuple[Record, Any]] = {}
        self._parents: dict[str, Record] = {}

    def add(self, state: Any, request: Any, parent: Any, context: RequestContext | None) -> None:
        """Note a request when vLLM does; `parent` is that of the requests that it makes of one with n > 1."""
        if parent is None:
            record = Record(name_of(request), request, request.sampling_params, context)
        elif parent.request_id in self._parents:
            record = self._parents[parent.request_id]
        else:
            record = Record(name_of(parent), request, parent.sampling_params, context, parent.n)
            self._parents[parent.request_id] = record
        record.open += 1
        self._requests[request.request_id] = (record, state)

    def finish(self, output: Any) -> None:
        """The engine is done with a request: `output` is its last `EngineCoreOutput`."""
        if output.request_id not in self._requests:
            return
        record, state = self._requests.pop(output.request_id)
        last = _last_output(state)
        if last is not None:
            ended = Ended(state, last.finish_reason, last.stop_reason, getattr(last, "weight_versions", None))
        else:
            # Without a reason of the engine's, vLLM has found a stop string.
            reason = "stop" if output.finish_reason is None else str(output.finish_reason)
            ended = Ended(state, reason, output.stop_reason)
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
                record.ended.append(Ended(state, finish_reason))
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
