"""`vllm.LLM`, which answers without a server: as ever, also where the variables are set; nothing of it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.common.reference import greedy
from tests.common.tiny_model import tiny_model
from tests.common.vllm import run, started_by
from tests.processes.every_endpoint import prompt_token_ids

pytestmark = pytest.mark.tier("all")

PROGRAM = """\
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    small = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 256 << 20}
    model = LLM(sys.argv[1], **small)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    [answer] = model.generate(prompt, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    with open(sys.argv[3], "w") as file:
        json.dump([answer.prompt_token_ids, answer.outputs[0].token_ids], file)
"""


def test_an_offline_model_answers_unchanged(tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "told.json"
    program.write_text(PROGRAM)
    prompt = prompt_token_ids()

    # By fork, as vLLM does by itself where it has a GPU.
    environment = {**started_by("fork"), "AGL_INSTRUMENT": "1", "AGL_STORE": str(tmp_path / "generations.db")}
    ran = run("python", str(program), str(tiny_model()), json.dumps(prompt), str(told), env=environment)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(told.read_text()) == [prompt, greedy(prompt, 8)]
    assert "agentlightning" not in ran.stdout + ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {program.name, told.name}
