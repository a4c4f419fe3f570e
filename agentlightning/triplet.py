"""What an algorithm learns from: what went into the model, what came out, and the reward."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from agentlightning.generation import Status

__all__ = ["Triplet"]

VERSION = ("version", "start", "end")


@dataclass(slots=True)
class Triplet:
    """A choice of a generation, in a rollout, and the reward that it got. What is unknown is None.

    Attributes:
        generation_id: the generation's `id`.
        response_id: the `id` of the answer that the client saw.
        rollout_id: the rollout that it was found in.
        attempt_id: the attempt that a span of the rollout, or else the call, says it is of.
        index: the choice's place among those of the generation.
        status: `finished`, `aborted` or `error`, of the generation.
        model: the name that the client asked for.
        prompt_token_ids, response_token_ids: what went into the model, and what it sampled; `array('i')`.
        logprobs: of each of `response_token_ids`; `array('f')`.
        reward: what `agentlightning.store.triplets` says belongs to it.
        span_id: the first span of the rollout that names the answer.
        weight_versions: `(version, start, end)`, as a `Choice` has them.
    """

    generation_id: str
    response_id: str | None
    rollout_id: str | None
    attempt_id: str | None
    index: int
    status: Status
    model: str | None
    prompt_token_ids: array[int] | None
    response_token_ids: array[int] | None
    logprobs: array[float] | None
    reward: float | None
    span_id: str | None
    weight_versions: list[tuple[str, int, int]] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, ids and logprobs as lists, versions by the names of their parts."""
        found = {name: getattr(self, name) for name in self.__slots__}
        for name in ("prompt_token_ids", "response_token_ids", "logprobs"):
            if found[name] is not None:
                found[name] = found[name].tolist()
        if self.weight_versions is not None:
            found["weight_versions"] = [dict(zip(VERSION, each, strict=True)) for each in self.weight_versions]
        return found

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Triplet:
        """What `as_dict` made this of, in JSON: a logprob that is null there is negative infinity.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        values = {name: found[name] for name in cls.__slots__}
        for name in ("prompt_token_ids", "response_token_ids"):
            if values[name] is not None:
                values[name] = array("i", values[name])
        if values["logprobs"] is not None:
            values["logprobs"] = array("f", [float("-inf") if each is None else each for each in values["logprobs"]])
        if values["weight_versions"] is not None:
            values["weight_versions"] = [tuple(each[name] for name in VERSION) for each in values["weight_versions"]]
        return cls(**values)
