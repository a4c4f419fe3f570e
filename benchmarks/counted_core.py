"""An engine core in one process with whoever asks it, for `benchmarks/counted.py`: a turn for each line that it reads.

Requests come and outputs go as messages between processes: encoded, and decoded. They have no mark, as those of the
Rust frontend, and so the engine core records them.
"""

from __future__ import annotations

import gc
import sys
import time
from itertools import count
from typing import Any

from benchmarks.paced import OFF, HeldRecordings, set_mode

TOKENS = 32
PROMPT = list(range(10, 40))


def main() -> None:
    """Read `MODE REQUESTS_AT_ONCE WAVES`, say `ready`, wait for a line, and say `done`; until there are no more."""
    from agentlightning.instrumentation.vllm import instrument_vllm, uninstrument_vllm

    recordings, core = HeldRecordings(), Core()
    for line in sys.stdin:
        mode, at_once, waves = line.split()
        uninstrument_vllm()
        set_mode(mode)
        if mode != OFF:
            instrument_vllm()
        core.wave(int(at_once))
        recordings.write()
        gc.collect()
        say("ready")
        sys.stdin.readline()
        for _ in range(int(waves)):
            core.wave(int(at_once))
        recordings.write()
        say("done")


def say(word: str) -> None:
    print(f"counted_core: {word}", flush=True)


class Core:
    """vLLM's engine core, with the tiny model."""

    def __init__(self) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor import Executor
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        from tests.common.tiny_model import tiny_model
        from tests.common.vllm import CACHE_BYTES, NO_WORKER

        config = EngineArgs(
            model=str(tiny_model()),
            max_model_len=1024,
            enforce_eager=True,
            dtype="float32",
            kv_cache_memory_bytes=CACHE_BYTES,
            distributed_executor_backend=NO_WORKER[1],
            async_scheduling=False,
        ).create_engine_config()
        self._core = EngineCore(config, Executor.get_class(config), log_stats=False)
        self._numbers = count()
        self._decoder: Any = MsgpackDecoder(EngineCoreRequest)
        self._encoder = MsgpackEncoder()
        self._buffer = bytearray()

    def wave(self, at_once: int) -> None:
        """Requests that all begin and end together."""
        core = self._core
        for _ in range(at_once):
            message = self._decoder.decode(self._encoder.encode(self._request()))
            core.add_request(*core.preprocess_add_request(message))
        while core.scheduler.has_requests():
            batches, was_executed = core.step()
            core.post_step(was_executed)
            for batch in batches.values():
                self._encoder.encode_into(batch, self._buffer)

    def _request(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest

        name = f"chatcmpl-{next(self._numbers):08x}"
        return EngineCoreRequest(
            request_id=f"{name}-0123abcd",
            external_req_id=name,
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=TOKENS, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )


if __name__ == "__main__":
    main()
