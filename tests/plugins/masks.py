"""A scheduler that has a sampling mask for each id, as the GPU's V2 model runner gives one: `--scheduler-cls`.

No logits reach it, so the masks are made up: of an id at its place in an answer it is the ids of `mask_of`. All else is
vLLM's own: its scheduler cuts each step's masks into those of the requests, and sends them on.
"""

from __future__ import annotations

import os
from typing import Any

import numpy
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
from vllm.v1.outputs import SamplingMaskLists

SIZE = int(os.environ.get("MASK_SIZE", "8"))
IDS = 400
"""Fewer than the tiny model has."""


def mask_of(token_id: int, place: int) -> list[int]:
    """Return what this id is said to be chosen from at this place of an answer; fewer at every third."""
    size = SIZE // 2 if place % 3 == 2 else SIZE
    return [token_id, *((token_id + place + each) % IDS for each in range(1, size))]


class Scheduler(VllmScheduler):
    """vLLM's own, told that it gets masks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_sampling_mask = True

    def _length(self, request_id: str) -> int:
        """Return how long an answer is before this step; one that was aborted meanwhile is not there."""
        request = self.requests.get(request_id)
        return 0 if request is None else len(request.output_token_ids)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        sampled = model_runner_output.sampled_token_ids
        masks = [
            mask_of(int(each), place)
            for request_id, of_request in zip(model_runner_output.req_ids, sampled, strict=True)
            for place, each in enumerate(of_request, self._length(request_id))
        ]
        starts = [0, *numpy.cumsum([len(of_request) for of_request in sampled]).tolist()]
        model_runner_output.sampling_masks = SamplingMaskLists(
            numpy.array([each for mask in masks for each in mask], dtype=numpy.int32),
            numpy.array([0, *numpy.cumsum([len(mask) for mask in masks])], dtype=numpy.int64),
            starts,
        )
        return super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
