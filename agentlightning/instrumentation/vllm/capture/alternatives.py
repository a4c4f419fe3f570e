"""The ids that sampled ones were chosen from (`--return-sampling-mask`), and the logprobs of others, for clients.

vLLM hands both out, and forgets with each part of a stream what it has handed out. So the masks of a request that is
recorded are also kept by a list that forgets nothing, and the list of the prompt's logprobs is kept itself. What the
engine gives are views of what it has for all requests of a step, which would keep all of it in memory: they are copied.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

from agentlightning.generation import SamplingMask, TopLogprobs
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import logprobs

__all__ = ["MaskChunks", "StepLogprobs", "StepMasks", "of_positions", "warn_of_missing_masks"]

logger = logging.getLogger("agentlightning")


def warn_of_missing_masks(model_config: Any) -> None:
    """Log that masks are not recorded with logprobs that cannot be computed again without them."""
    mode = logprobs.mode_of(model_config)
    if logprobs.is_processed(mode) and not getattr(model_config, "return_sampling_mask", False):
        has_option = hasattr(model_config, "return_sampling_mask")
        logger.warning(
            "agentlightning: logprobs are %s here, and what ids were chosen from is not recorded with them: %s",
            mode,
            "--return-sampling-mask is off" if has_option else "this release has no --return-sampling-mask",
        )


class StepMasks:
    """The masks of one request, step by step."""

    def __init__(self) -> None:
        self._counts = array("I")
        self._ids = array("i")

    def add(self, found: Any) -> None:
        """Add vLLM's `SamplingMaskLists` of a step."""
        ids, ends = found.token_ids, found.offsets
        counts = [len(ids)] if ends is None else (ends[1:] - ends[:-1]).tolist()
        self._ids.frombytes(ids.astype("int32", copy=False).tobytes())
        self._counts.extend(counts)

    def joined(self, count: int) -> SamplingMask | None:
        """Return those of `count` ids; None if the engine gave fewer. There may be more: of ids after a stop string."""
        if not self._counts or len(self._counts) < count:
            return None
        counts = self._counts[:count]
        return SamplingMask.of_counts(counts, self._ids[: sum(counts)])

    @property
    def nbytes(self) -> int:
        return 4 * (len(self._counts) + len(self._ids))


class MaskChunks(list[Any]):
    """vLLM's list of the masks that no output has carried yet, for one request.

    Attributes:
        masks: those of all ids so far.
    """

    def __init__(self) -> None:
        self.masks = StepMasks()

    def append(self, chunk: Any) -> None:
        """Add those of a step."""
        # An error here would end vLLM's loop, and with it the engine.
        contained("keeping sampling masks", self.masks.add, chunk)
        super().append(chunk)


def of_positions(positions: Sequence[Any], count: int, *, also_alone: bool = False) -> TopLogprobs | None:
    """Convert what vLLM has made for a client: for each of `count` ids a dictionary of logprobs by id.

    Args:
        also_alone: also if no id has alternatives, so that its own logprob is all there is.
    """
    if len(positions) < count:
        return None
    found = [positions[place] or {} for place in range(count)]
    if not also_alone and all(len(each) <= 1 for each in found):
        return None
    offsets = array("I", accumulate(map(len, found), initial=0))
    logprobs = array("f", (each.logprob for each in chain.from_iterable(position.values() for position in found)))
    return TopLogprobs(offsets, array("i", chain.from_iterable(found)), logprobs)


class StepLogprobs:
    """Logprobs as the engine gives them, step by step: of each id, then of the likeliest ones.

    Args:
        most: how many beside that of the id itself; -1 for all.
    """

    def __init__(self, most: int) -> None:
        self._columns = None if most < 0 else most + 1
        self._steps: list[tuple[Any, Any]] = []

    def add(self, found: Any) -> None:
        """Add vLLM's `LogprobsLists` of a step, or the `LogprobsTensors` of a prompt."""
        ids, logprobs = (self._copy(each) for each in found[:2])
        self._steps.append((ids, logprobs))

    def _copy(self, rows: Any) -> Any:
        # There may be more columns than this request wants. Up to 0.11.0 they are lists.
        if isinstance(rows, list):
            return [row[: self._columns] for row in rows]
        rows = rows[:, : self._columns]
        return rows.clone() if hasattr(rows, "clone") else rows.copy()

    def joined(self, count: int, skipped: int = 0) -> TopLogprobs | None:
        """Return those of `count` ids, of which so many at the beginning have none; None if the engine gave fewer.

        For the writing thread: of a long prompt, this takes a while.
        """
        counts, ids, logprobs = [0] * skipped, array("i"), array("f")
        for rows in self._steps:
            for row in zip(*(each if isinstance(each, list) else each.tolist() for each in rows), strict=True):
                # An id that is among the likeliest is there twice.
                pairs = dict(zip(*row, strict=True))
                counts.append(len(pairs))
                ids.extend(pairs)
                logprobs.extend(pairs.values())
        if len(counts) < count:
            return None
        offsets = array("I", accumulate(counts[:count], initial=0))
        return TopLogprobs(offsets, ids[: offsets[-1]], logprobs[: offsets[-1]])

    @property
    def nbytes(self) -> int:
        """Bytes that are kept until then."""
        return sum(map(_nbytes, chain.from_iterable(self._steps)))


def _nbytes(rows: Any) -> int:
    # A Python number and its place in a list.
    return sum(map(len, rows)) * 40 if isinstance(rows, list) else rows.nbytes
