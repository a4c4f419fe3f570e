"""`AGL_LOGPROBS=on`: the logprobs of the sampled ids, for the recording alone.

If asked, the engine computes them cheaply; the expensive part is what vLLM then makes of its arrays for the client, a
dictionary with an object and a text for every id. So the engine is asked after vLLM has noted that the client wants
none, and its arrays are taken before vLLM looks for them: answers stay unchanged.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from copy import copy
from typing import Any
from weakref import WeakMethod

from agentlightning.instrumentation.vllm._isolation import contained

__all__ = [
    "BYTES_PER_STEP",
    "LogprobsTap",
    "are_requested",
    "is_processed",
    "join",
    "mode_of",
    "of_sampled_ids",
    "pack",
    "request_from_engine",
    "take",
]

_PACKED = "agentlightning"
BYTES_PER_STEP = 120
"""Bytes that the array of one step keeps alive."""


def are_requested(sampling_params: Any) -> bool:
    """Tell whether a client has asked for logprobs with these parameters: then vLLM's are recorded."""
    # From 0.22 a client may name the ids whose logprobs it wants.
    return sampling_params.logprobs is not None or getattr(sampling_params, "logprob_token_ids", None) is not None


def request_from_engine(request: Any) -> None:
    """Have the engine compute the logprobs of the ids that it samples for a request.

    Args:
        request: vLLM's `EngineCoreRequest` or `Request`. It gets its own copy of its parameters, which may be shared:
            by the requests that vLLM makes of one with n > 1, and by the recording, which keeps what the client sent.
    """
    params = copy(request.sampling_params)
    # Only the sampled id's: vLLM's number counts further ids.
    params.logprobs = 0
    request.sampling_params = params


def mode_of(model_config: Any) -> str:
    """Return the kind of an engine's logprobs, in vLLM's words."""
    # Up to 0.9 there is only the kind that later got this name; in 0.10 and 0.11.0 (as read) it is an Enum.
    mode = getattr(model_config, "logprobs_mode", "raw_logprobs")
    return str(getattr(mode, "value", mode))


def is_processed(mode: str) -> bool:
    """Tell whether logprobs of this kind are those after temperature, top-p and the like."""
    return mode.startswith("processed")


class LogprobsTap:
    """Replace `LogprobsProcessor.update_from_output` for one request, and keep the logprobs from vLLM.

    Args:
        processor: the request's `LogprobsProcessor`.

    Attributes:
        steps: the logprobs of each step.
    """

    def __init__(self, processor: Any) -> None:
        # The processor holds this object: a strong reference back would leave both to the garbage collector.
        self._update = WeakMethod(processor.update_from_output)
        self.steps: list[array[float]] = []

    def __call__(self, output: Any) -> None:
        """Take the logprobs from an `EngineCoreOutput`, then let vLLM see it."""
        # An error here would end vLLM's loop, and with it the engine.
        contained("taking logprobs", take, output, self.steps)
        update = self._update()
        # vLLM calls this through the processor, so it still exists.
        assert update is not None
        update(output)


def pack(output: Any) -> Any:
    """Return a copy of an `EngineCoreOutput` in which one string replaces three arrays, for an instrumented frontend.

    For each id, unpacking arrays would cost that frontend more than all other recording. A copy, since a user's
    scheduler may keep the outputs that it has returned.
    """
    found = output.new_logprobs
    # The string goes into vLLM's trace headers, which are unused if requests are not traced (up to 0.10.1, as read,
    # there are none). Up to 0.11.0 logprobs are lists, which cost little.
    if found is None or getattr(output, "trace_headers", output) is not None or isinstance(found.logprobs, list):
        return output
    output = copy(output)
    output.trace_headers = {_PACKED: found.logprobs[:, 0].tobytes().hex()}
    output.new_logprobs = None
    return output


def take(output: Any, steps: list[array[float]]) -> None:
    """Move the logprobs of an `EngineCoreOutput` to the end of `steps`."""
    headers = getattr(output, "trace_headers", None)
    if headers and _PACKED in headers:
        output.trace_headers = None
        steps.append(array("f", bytes.fromhex(headers[_PACKED])))
        return
    found = output.new_logprobs
    if found is not None:
        output.new_logprobs = None
        steps.append(of_sampled_ids(found.logprobs))


def of_sampled_ids(rows: Any) -> array[float]:
    """Return the first column of the engine's rows, the logprobs of the sampled ids: a copy.

    Args:
        rows: float32 of shape [ids, logprobs per id]: a view of the message that all requests of a step came in, which
            would keep all of it in memory. Up to 0.11.0, lists of numbers.
    """
    return array("f", (row[0] for row in rows)) if isinstance(rows, list) else array("f", rows[:, 0].tobytes())


def join(steps: Iterable[array[float]], count: int) -> array[float] | None:
    """Return one logprob for each of `count` ids; None if the engine gave fewer.

    There may be more: those of ids after a stop string.
    """
    found = array("f")
    for step in steps:
        found.extend(step)
    return found[:count] if len(found) >= count else None
