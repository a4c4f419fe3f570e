"""The cost of recording for an offline `LLM`, whose program waits for it.

One program, in a process of its own, generates in turns: as vLLM does, once more, which shows what is read where
nothing differs, and recorded to SQLite. It is patched for these turns alone. Its engine core never is: it has a process
of its own, and no part in the recording.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from agentlightning.instrumentation.vllm import instrument_vllm, uninstrument_vllm
from agentlightning.instrumentation.vllm.capture import in_process
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.rollout_name import rollouts
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from tests.common.tiny_model import tiny_model
from tests.common.vllm import CACHE_BYTES, QUIET, without_agl

STARTS, SECONDS = 2, 120
QUICK_STARTS, QUICK_SECONDS = 1, 40
MIN_ROUNDS = 15
"""Seconds for all starts together, however slow the machine is."""
ROUNDS = "rounds.json"
PROMPTS, LENGTH, TOKENS, CALLS = 64, 128, 64, 4
VLLM, AGAIN, OURS = "vLLM", "vLLM, again", "vLLM, recorded to SQLite"
ABOUT = (
    f"A turn is {CALLS} calls of LLM.generate, each with {PROMPTS} prompts of {LENGTH} ids and {TOKENS} more for each, "
    "by a tiny model; recorded, each prompt is of another rollout, and what the last call has generated is written "
    "after the turn."
)

Round = Mapping[str, float]


def measure(quick: bool) -> Part:
    """Start the program, and again."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: list[Round] = []
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    for start in range(starts):
        say(f"offline: starting a program, {start + 1} of {starts}")
        with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder, busy.running():
            command = (sys.executable, "-m", __name__, folder, str(seconds), str(MIN_ROUNDS // starts + 1))
            env = {**without_agl(os.environ), **QUIET}
            ran = subprocess.run(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
            )
            if ran.returncode:
                raise RuntimeError(f"the program ended with {ran.returncode}: {ran.stderr[-2000:]}")
            rounds += json.loads(Path(folder, ROUNDS).read_text())
    rates = {name: [each[name] for each in rounds] for name in (VLLM, AGAIN, OURS)}
    at_least = Target(0.97, at_least=True)
    rows = [Row.of(name, values, rates[VLLM], at_least if name == OURS else None) for name, values in rates.items()]
    return Part("An offline LLM", ABOUT, [Section("throughput", "ids a second", "", rows)], busy.share_of_others())


def take_turns(folder: Path, seconds: float, at_least: int) -> None:
    """Let one program generate in turns, each way in each round, and write the rounds to a file in the folder."""
    from vllm import LLM

    model = LLM(
        str(tiny_model()),
        max_model_len=1024,
        enforce_eager=True,
        dtype="float32",
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
    )
    os.environ |= {"AGL_STORE": str(folder / "offline.db"), "AGL_RECORD_OFFLINE": "on"}
    for name in (VLLM, OURS):
        turn(model, name)
    rounds: list[Round] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or len(rounds) < at_least:
        order = [VLLM, AGAIN, OURS]
        random.shuffle(order)
        rounds.append({name: turn(model, name) for name in order})
    (folder / ROUNDS).write_text(json.dumps(rounds))


def turn(model: Any, name: str) -> float:
    """Return how many ids a second it has generated."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    calls = [[prompt() for _ in range(PROMPTS)] for _ in range(CALLS)]
    names = rollouts([f"ro-{number}" for number in range(PROMPTS)])
    before = 0
    if name == OURS:
        instrument_vllm()
        in_process.begin(model.llm_engine, model.llm_engine.vllm_config)
        before = session.recorder.counters().generations
    started = time.perf_counter()
    with names:
        for prompts in calls:
            outputs = model.generate(prompts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs)
    elapsed = time.perf_counter() - started
    if name == OURS:
        recorder = session.recorder
        while recorder.counters().queue_bytes:
            time.sleep(0.01)
        assert recorder.counters().generations - before == PROMPTS * CALLS, "not all of it was recorded"
        uninstrument_vllm()
    return PROMPTS * CALLS * TOKENS / elapsed


def prompt() -> dict[str, Sequence[int]]:
    return {"prompt_token_ids": [random.randrange(10, 400) for _ in range(LENGTH)]}


if __name__ == "__main__":
    take_turns(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
