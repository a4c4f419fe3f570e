"""The same worker for vLLM's V0 engine: `--worker-cls tests.releases.v0_worker.ChosenTokensWorker`.

Nothing of it was left in 0.11: where vLLM is newer, this cannot be imported.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.sampler import SamplerOutput  # pyright: ignore[reportMissingImports]
from vllm.sequence import (  # pyright: ignore[reportAttributeAccessIssue]
    CompletionSequenceGroupOutput,  # pyright: ignore[reportAttributeAccessIssue]
    Logprob,  # pyright: ignore[reportAttributeAccessIssue]
    SequenceOutput,  # pyright: ignore[reportAttributeAccessIssue]
)

from tests.releases.chosen import PACE, chosen_token_ids

BLOCKS = 4096
"""Blocks of the cache of keys and values, of which there is none."""


class ChosenTokensWorker:
    """The methods that vLLM's V0 engine calls of a worker."""

    def __init__(self, vllm_config: Any, rank: int, **_: Any) -> None:
        self.rank = rank
        self._model = Path(vllm_config.model_config.model)

    def init_device(self) -> None: ...

    def load_model(self) -> None: ...

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None: ...

    def determine_num_available_blocks(self) -> tuple[int, int]:
        return BLOCKS, 0

    def start_worker_execution_loop(self) -> None: ...

    def execute_model(self, asked: Any = None) -> list[SamplerOutput]:
        time.sleep(PACE)
        # Without requests it is the end of a batch.
        return [SamplerOutput(outputs=[self._step(group) for group in asked.seq_group_metadata_list])] if asked else []

    def _step(self, group: Any) -> CompletionSequenceGroupOutput:
        if not group.do_sample:
            return CompletionSequenceGroupOutput(samples=[], prompt_logprobs=None)
        params = group.sampling_params
        says = chosen_token_ids(self._model, params.seed or 0)
        samples = []
        for sequence_id, data in group.seq_data.items():
            token = says[data.get_output_len()]
            logprobs = {token + other: Logprob(-0.5 - other, other + 1) for other in range(1 + (params.logprobs or 0))}
            samples.append(SequenceOutput(sequence_id, token, logprobs))
        return CompletionSequenceGroupOutput(samples=samples, prompt_logprobs=None)
