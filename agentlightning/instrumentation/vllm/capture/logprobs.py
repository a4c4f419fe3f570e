"""`AGL_LOGPROBS=on`: the logprobs of the sampled ids, for the recording alone.

The engine computes them in any case when it is asked to; what makes them dear is what vLLM then makes of its arrays for
whoever asked, a dictionary with an object and a text for every id. Here the engine is asked after vLLM has noted that
nobody wants any, and its arrays are taken before vLLM looks for them: answers stay as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from copy import copy
from typing import Any
from weakref import WeakMethod

from agentlightning.instrumentation.vllm._isolation import contained

__all__ = [
    "BYTES_PER_PART",
    "Taking",
    "are_wanted",
    "ask_for_them",
    "first_of_each",
    "mode_of",
    "of_sampled_ids",
    "packed",
    "take",
]

_PACKED = "agentlightning"
BYTES_PER_PART = 120
"""What the array of one step holds on to."""


def are_wanted(sampling_params: Any) -> bool:
    """Whether a client has asked for some, with these parameters: then vLLM has them, and they are recorded too."""
    # From 0.22 a client may name the ids whose logprobs it wants.
    return sampling_params.logprobs is not None or getattr(sampling_params, "logprob_token_ids", None) is not None


def ask_for_them(request: Any) -> None:
    """Have the engine compute the logprobs of the ids that it samples for a request.

    Args:
        request: vLLM's `EngineCoreRequest` or `Request`. It gets parameters of its own, since those that it has may be
            shared: by the requests that vLLM makes of one with n > 1, and by the recording, which keeps them as the
            client sent them.
    """
    params = copy(request.sampling_params)
    # Of the sampled id alone: vLLM's number counts the ids besides.
    params.logprobs = 0
    request.sampling_params = params


def mode_of(model_config: Any) -> str:
    """What an engine's logprobs are of, in vLLM's words."""
    # To 0.9 there is one way alone, which later has this name; in 0.10 and 0.11.0 (as read) it is an Enum.
    mode = getattr(model_config, "logprobs_mode", "raw_logprobs")
    return str(getattr(mode, "value", mode))


class Taking:
    """Stands before `LogprobsProcessor.update_from_output` of one request, which vLLM calls with what it gets for it.

    Args:
        processor: vLLM's `LogprobsProcessor`, which is to see none of them.

    Attributes:
        parts: those of each step.
    """

    def __init__(self, processor: Any) -> None:
        # The processor holds this: held in turn, both would wait for the garbage collector.
        self._update = WeakMethod(processor.update_from_output)
        self.parts: list[array[float]] = []

    def __call__(self, output: Any) -> None:
        """Take them off an `EngineCoreOutput`."""
        # An error here would end vLLM's loop, and with it the engine.
        contained("taking logprobs", take, output, self.parts)
        update = self._update()
        # vLLM calls this by way of the processor, which is there.
        assert update is not None
        update(output)


def packed(output: Any) -> Any:
    """Return a copy of an `EngineCoreOutput` in which one text stands for three arrays, for a frontend that takes them.

    To unpack arrays costs that frontend more, for each id, than all else that recording does. A copy, since a user's
    scheduler may keep the outputs that it has returned.
    """
    found = output.new_logprobs
    # In vLLM's trace headers, which are nobody's where nothing is traced (to 0.10.1, as read, there are none). Up to
    # 0.11.0 there are lists, which cost little.
    if found is None or getattr(output, "trace_headers", output) is not None or isinstance(found.logprobs, list):
        return output
    output = copy(output)
    output.trace_headers = {_PACKED: found.logprobs[:, 0].tobytes().hex()}
    output.new_logprobs = None
    return output


def take(output: Any, parts: list[array[float]]) -> None:
    """Take them off an `EngineCoreOutput`, and put them where the others are."""
    packed = getattr(output, "trace_headers", None)
    if packed and _PACKED in packed:
        output.trace_headers = None
        parts.append(array("f", bytes.fromhex(packed[_PACKED])))
        return
    found = output.new_logprobs
    if found is not None:
        output.new_logprobs = None
        parts.append(first_of_each(found.logprobs))


def first_of_each(rows: Any) -> array[float]:
    """Of the engine's rows, one an id, the logprob of the sampled id: a copy.

    Args:
        rows: an array of float32, [ids, logprobs an id], a part of the message that all requests of a step came in, and
            keeps all of it in memory; lists of numbers up to 0.11.0.
    """
    return array("f", (row[0] for row in rows)) if isinstance(rows, list) else array("f", rows[:, 0].tobytes())


def of_sampled_ids(parts: Iterable[array[float]], count: int) -> array[float] | None:
    """The logprobs of the sampled ids, one an id; None where the engine has not given as many.

    Args:
        parts: those of each step.
        count: how many ids are kept: of those past a stop string there may be more logprobs.
    """
    found = array("f")
    for part in parts:
        found.extend(part)
    return found[:count] if len(found) >= count else None
