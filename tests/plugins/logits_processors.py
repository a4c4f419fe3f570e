"""A user's logits processors: `--logits-processors`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor

from tests.plugins.describe import write

FORCED_TOKEN = 300


class Adapter(AdapterLogitsProcessor):
    """Force a token if a request has extra arguments, a common way to turn a processor on."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[Sequence[int], Any], Any] | None:
        write("processor: new_req_logits_processor", params)
        if not params.extra_args:
            return None
        target = params.extra_args["target"]

        def force(output_ids: Sequence[int], logits: Any) -> Any:
            wanted = logits[target].clone()
            logits.fill_(float("-inf"))
            logits[target] = wanted
            return logits

        return force


class Batch(LogitsProcessor):
    """Change nothing, and write down each batch."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        write("processor: validate_params", sampling_params)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any) -> Any:
        return logits

    def update_state(self, batch_update: Any) -> None:
        for _, params, prompt_ids, _ in batch_update.added if batch_update else ():
            write("processor: update_state", params, prompt_ids)
