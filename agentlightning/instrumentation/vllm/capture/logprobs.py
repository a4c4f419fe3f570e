"""`AGL_LOGPROBS=on`: the logprobs of the sampled ids, for the recording alone.

If asked, the engine computes them cheaply; the expensive part is what vLLM then makes of its arrays for the client, a
dictionary with an object and a text for every id. So the engine is asked after vLLM has noted that the client wants
none, and its arrays are taken before vLLM looks for them: answers stay unchanged.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence, Sequence
from copy import copy
from typing import Any
from weakref import ref

from agentlightning.instrumentation.vllm._isolation import contained

__all__ = [
    "LogprobsTap",
    "add_sampled",
    "are_requested",
    "is_processed",
    "join",
    "mode_of",
    "pack",
    "request_from_engine",
    "take",
]

_PACKED = "agentlightning"


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
        found: the logprobs so far, one for each sampled id.
    """

    def __init__(self, processor: Any) -> None:
        # The processor holds this object: a strong reference back would leave both to the garbage collector.
        self._processor = ref(processor)
        self._update = type(processor).update_from_output
        self.found = array("f")

    def __call__(self, output: Any) -> None:
        """Take the logprobs from an `EngineCoreOutput`, then let vLLM see it."""
        # An error here would end vLLM's loop, and with it the engine.
        contained("taking logprobs", take, output, self.found)
        # vLLM calls this through the processor, so it still exists.
        self._update(self._processor(), output)


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
    sampled = array("f")
    add_sampled(found.logprobs, sampled)
    output.trace_headers = {_PACKED: sampled.tobytes().hex()}
    output.new_logprobs = None
    return output


def take(output: Any, found: MutableSequence[float]) -> None:
    """Move the logprobs of the sampled ids from an `EngineCoreOutput` to the end of `found`."""
    headers = getattr(output, "trace_headers", None)
    if headers and _PACKED in headers:
        output.trace_headers = None
        found.extend(array("f", bytes.fromhex(headers[_PACKED])))
        return
    if output.new_logprobs is not None:
        rows, output.new_logprobs = output.new_logprobs.logprobs, None
        add_sampled(rows, found)


def add_sampled(rows: Any, found: MutableSequence[float]) -> None:
    """Add the first column of the engine's rows, the logprobs of the sampled ids.

    Args:
        rows: float32 of shape [ids, logprobs per id]: a view of the message that all requests of a step came in, which
            would keep all of it in memory. Up to 0.11.0, lists of numbers.
    """
    if isinstance(rows, list):
        found.extend([row[0] for row in rows])
    elif len(rows) == 1:
        # As in most steps. A number is quicker than a view of the rows.
        found.append(rows[0, 0])
    else:
        found.extend(rows[:, 0].tolist())


def join(found: Sequence[float], count: int) -> array[float] | None:
    """Return one logprob for each of `count` ids; None if the engine gave fewer.

    There may be more: those of ids after a stop string.
    """
    return array("f", found[:count]) if len(found) >= count else None
