"""The ids that sampled ones were chosen from (`--return-sampling-mask`), and the logprobs of others, for clients.

vLLM hands both out, and forgets with each part of a stream what it has handed out. So the masks of a request that is
recorded are kept in a list that forgets nothing, and the list of the prompt's logprobs is kept itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

from agentlightning.generation import SamplingMask, TopLogprobs

__all__ = ["MaskChunks", "StepLogprobs", "mask_of", "nbytes_of", "of_positions"]


class MaskChunks(list[Any]):
    """vLLM's list of the masks that no output has carried yet, for one request.

    Attributes:
        carried: those that one has, in order.
    """

    def __init__(self) -> None:
        self.carried: list[Any] = []

    def clear(self) -> None:
        """Forget them, as vLLM does once an output carries them."""
        self.carried += self
        super().clear()

    @property
    def all(self) -> list[Any]:
        """The masks of all ids so far."""
        return [*self.carried, *self]


def mask_of(chunks: Sequence[Any], count: int) -> SamplingMask | None:
    """Make one mask of vLLM's `SamplingMaskLists`.

    Args:
        count: how many ids it is for. There may be masks of more: of ids after a stop string.
    """
    counts: list[int] = []
    ids = array("i")
    for chunk in chunks:
        ids.frombytes(chunk.token_ids.astype("int32", copy=False).tobytes())
        counts += [len(chunk.token_ids)] if chunk.offsets is None else (chunk.offsets[1:] - chunk.offsets[:-1]).tolist()
    if not chunks or len(counts) < count:
        return None
    return SamplingMask.of_counts(counts[:count], ids[: sum(counts[:count])])


def nbytes_of(chunks: Iterable[Any]) -> int:
    """Return how many bytes these masks keep alive."""
    return sum(chunk.token_ids.nbytes for chunk in chunks)


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
        self._counts = array("I")
        self._ids = array("i")
        self._logprobs = array("f")

    def add(self, found: Any) -> None:
        """Add vLLM's `LogprobsLists` of a step, or the `LogprobsTensors` of a prompt."""
        # Up to 0.11.0 they are lists.
        ids, logprobs = (each if isinstance(each, list) else each.tolist() for each in found[:2])
        for ids_of_one, logprobs_of_one in zip(ids, logprobs, strict=True):
            # An id that is among the likeliest is there twice, and there may be more than this request wants.
            pairs = dict(zip(ids_of_one[: self._columns], logprobs_of_one[: self._columns], strict=True))
            self._counts.append(len(pairs))
            self._ids.extend(pairs)
            self._logprobs.extend(pairs.values())

    def joined(self, count: int, skipped: int = 0) -> TopLogprobs | None:
        """Return those of `count` ids, of which so many at the beginning have none; None if the engine gave fewer."""
        if len(self._counts) < count - skipped:
            return None
        offsets = array("I", accumulate([0] * skipped + self._counts[: count - skipped].tolist(), initial=0))
        return TopLogprobs(offsets, self._ids[: offsets[-1]], self._logprobs[: offsets[-1]])

    @property
    def nbytes(self) -> int:
        return 12 * len(self._ids)
