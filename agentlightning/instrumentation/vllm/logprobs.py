"""`AGL_LOGPROBS=on`: the logprobs of the sampled ids, for the recording alone.

The engine computes them in any case when it is asked to; what makes them dear is what vLLM then makes of its arrays for
whoever asked, a dictionary with an object and a text for every id. Here the engine is asked after vLLM has noted that
nobody wants any, and its arrays are taken before vLLM looks for them: answers stay as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["BYTES_PER_PART", "NUMBER_ASKED_FOR", "Taking", "are_wanted", "mode_of", "of_sampled_ids", "pack", "take"]

_PACKED = "agentlightning"
NUMBER_ASKED_FOR = 0
"""Of the sampled id alone: vLLM's `logprobs` counts those besides."""
BYTES_PER_PART = 120
"""What the array of one step holds on to."""


def are_wanted(sampling_params: Any) -> bool:
    """Whether a client has asked for some, with these parameters: then vLLM has them, and they are recorded too."""
    # From 0.22 a client may name the ids whose logprobs it wants.
    return sampling_params.logprobs is not None or getattr(sampling_params, "logprob_token_ids", None) is not None


def mode_of(model_config: Any) -> str:
    """What an engine's logprobs are of, in vLLM's words."""
    # To 0.9 there is one way alone, which later has this name; in 0.10 and 0.11.0 (as read) it is an Enum.
    mode = getattr(model_config, "logprobs_mode", "raw_logprobs")
    return str(getattr(mode, "value", mode))


class Taking:
    """Stands before `LogprobsProcessor.update_from_output` of one request, which vLLM calls with what it gets for it.

    Args:
        update: vLLM's, which is to see none of them.

    Attributes:
        parts: the engine's arrays so far, as `of_sampled_ids` takes them.
    """

    def __init__(self, update: Callable[[Any], object]) -> None:
        self._update = update
        self.parts: list[Any] = []

    def __call__(self, output: Any) -> None:
        """Take them off an `EngineCoreOutput`."""
        take(output, self.parts)
        self._update(output)


def pack(output: Any) -> None:
    """Make three arrays of an `EngineCoreOutput` one text, on its way to a frontend of ours that will `take` them.

    To unpack arrays costs that frontend more, for each id, than all else that recording does.
    """
    found = output.new_logprobs
    # In vLLM's trace headers, which are nobody's where nothing is traced (to 0.10.1, as read, there are none). Up to
    # 0.11.0 there are lists, which cost little.
    if found is None or getattr(output, "trace_headers", output) is not None or isinstance(found.logprobs, list):
        return
    output.trace_headers = {_PACKED: found.logprobs[:, 0].tobytes().hex()}
    output.new_logprobs = None


def take(output: Any, parts: list[Any]) -> None:
    """Take them off an `EngineCoreOutput`, and put them where the others are."""
    packed = getattr(output, "trace_headers", None)
    if packed and _PACKED in packed:
        output.trace_headers = None
        parts.append(array("f", bytes.fromhex(packed[_PACKED])))
        return
    found = output.new_logprobs
    if found is not None:
        output.new_logprobs = None
        parts.append(found.logprobs)


def of_sampled_ids(parts: Iterable[Iterable[Any]], count: int) -> array[float] | None:
    """The logprobs of the sampled ids, one an id; None where the engine has not given as many.

    Args:
        parts: arrays of one row an id, in which the sampled id's comes first (lists up to 0.11.0); or what was packed.
        count: how many ids are kept: of those past a stop string there may be more logprobs.
    """
    found = array("f")
    for part in parts:
        found.extend(part if isinstance(part, array) else array("f", (row[0] for row in part)))
    return found[:count] if len(found) >= count else None
