"""A vLLM worker without a model: `--worker-cls tests.releases.worker.ChosenTokensWorker`.

It stands where a release's compiled part does not run on the machine. All else is the release's own: API servers,
`AsyncLLM`, output processor, the engine core in its process, scheduler. What a model would say, a request's `seed`
chooses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput

from tests.releases.chosen import PACE, chosen_token_ids

AS_ARRAY: Any = numpy.array if "ndarray" in str(ModelRunnerOutput.__annotations__["sampled_token_ids"]) else list
"""Around 0.11 the ids of a step are an array."""
MEMORY = 2**27
"""Bytes that the worker says it has for the cache of keys and values, of which it has none."""


@dataclass
class Request:
    """One that the scheduler knows: what it says, and how far it has come."""

    says: list[int]
    prompt: int
    computed: int
    logprobs: int


class ChosenTokensWorker:
    """The methods that vLLM's V1 engine calls of a worker."""

    def __init__(self, vllm_config: Any, rank: int, **_: Any) -> None:
        self.rank = rank
        self._model = Path(vllm_config.model_config.model)
        self._block_size = vllm_config.cache_config.block_size
        self._requests: dict[str, Request] = {}

    def init_device(self) -> None: ...

    def load_model(self, **_: Any) -> None: ...

    def initialize_from_config(self, kv_cache_config: Any) -> None: ...

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None: ...

    def compile_or_warm_up_model(self) -> None: ...

    def reset_mm_cache(self) -> None: ...

    def check_health(self) -> None: ...

    def shutdown(self) -> None: ...

    def get_kv_connector_handshake_metadata(self) -> None: ...

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def determine_available_memory(self) -> int:
        return MEMORY

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        options = {"block_size": self._block_size, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
        if any(field.name == "use_mla" for field in fields(FullAttentionSpec)):
            options["use_mla"] = False
        return {"model.layers.0.self_attn.attn": FullAttentionSpec(**options)}

    def execute_model(self, scheduled: Any) -> ModelRunnerOutput:
        time.sleep(PACE)
        for request_id in scheduled.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            says = chosen_token_ids(self._model, params.seed or 0)
            prompt, computed = len(new.prompt_token_ids), new.num_computed_tokens
            self._requests[new.req_id] = Request(says, prompt, computed, params.logprobs or 0)
        requests = {request_id: self._requests[request_id] for request_id in scheduled.num_scheduled_tokens}
        sampled = [
            self._step(request, scheduled.num_scheduled_tokens[request_id]) for request_id, request in requests.items()
        ]
        options = {"spec_token_ids": None, "pooler_output": [], "prompt_logprobs_dict": {}}
        names = {field.name for field in fields(ModelRunnerOutput)}
        return ModelRunnerOutput(
            req_ids=list(requests),
            req_id_to_index={request_id: index for index, request_id in enumerate(requests)},
            sampled_token_ids=[AS_ARRAY(ids) for ids in sampled],
            logprobs=logprobs(sampled, 1 + max((request.logprobs for request in requests.values()), default=0)),
            **{name: value for name, value in options.items() if name in names},
        )

    def _step(self, request: Request, scheduled: int) -> list[int]:
        """The next token, unless part of the prompt is still to come."""
        request.computed += scheduled
        said = request.computed - request.prompt
        return [request.says[said]] if said >= 0 else []


def logprobs(sampled: list[list[int]], width: int) -> Any:
    """Made-up ones for each request's token, and for `width` - 1 others, in lists or arrays, as they are there."""
    tokens = torch.tensor([[(ids[0] if ids else 0) + column for column in range(width)] for ids in sampled])
    values = torch.tensor([[-0.5 - column for column in range(width)] for _ in sampled])
    return LogprobsTensors(tokens, values, torch.ones(len(sampled), dtype=torch.int32)).tolists()
