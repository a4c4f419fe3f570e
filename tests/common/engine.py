"""vLLM's own `OutputProcessor`, with whoever uses it in the place of the engine; and what it has recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.recorder import Recorder
from agentlightning.store import open_store


def kept(path: Path, recorder: Recorder | None = None) -> list[Generation]:
    """Return what this process has recorded into the file, once all of it is there.

    Args:
        recorder: the one that writes the file; by default the session's.
    """
    recorder = recorder or session.recorder
    # Not by `close`, which waits for some seconds only.
    while recorder.counters().queue_bytes:
        time.sleep(0.01)
    recorder.close()
    with open_store(str(path), read_only=True) as store:
        return [*store.generations()]


# Options that are no sampling parameters.
OF_REQUESTS = ("resumable", "pooling_params", "mm_features", "prompt_embeds", "prompt_is_token_ids")


class Engine:
    """An engine that gives prepared outputs to requests, which are registered as `AsyncLLM` registers them."""

    def __init__(self) -> None:
        self.processor = OutputProcessor(tokenizer=None, log_stats=False)

    def add(
        self, name: str, prompt: list[int] | None, *, stream: bool = False, queue: bool = True, **options: Any
    ) -> None:
        """Register a request, under its name and `-0`; with `n`, those that vLLM makes of it."""
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        extra = {option: options.pop(option) for option in OF_REQUESTS if option in options}
        params = None if "pooling_params" in extra else SamplingParams(output_kind=kind, detokenize=False, **options)
        request = EngineCoreRequest(
            request_id=f"{name}-0",
            external_req_id=name,
            prompt_token_ids=prompt,
            sampling_params=params,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            **{"pooling_params": None, "mm_features": None, **extra},
        )
        collector = RequestOutputCollector(kind, name) if queue else None
        if params is None or params.n == 1:
            self.processor.add_request(request, None, None, 0, collector)
            return
        parent = ParentRequest(request)
        for index in range(params.n):
            child = copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self.processor.add_request(child, None, parent, index, collector)

    def says(self, request_id: str, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> None:
        """One step for one request."""
        self.steps([EngineCoreOutput(request_id, [*token_ids], finish_reason=finish_reason)])

    def steps(self, outputs: list[EngineCoreOutput], weights: str | None = None) -> None:
        """One step for several of them, with the weights of this name."""
        self.processor.process_outputs(outputs, weight_version=weights)
