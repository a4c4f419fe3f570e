"""vLLM in actors of Ray, as verl and OpenRLHF have it: recorded, and named without a line in verl's server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.common.environments import CHECKOUT
from tests.common.tiny_model import tiny_model
from tests.common.vllm import LITTLE_CACHE, NO_WORKER, QUIET, SMALL, free_port, without_agl
from tools.lock import constraints_of_tests

pytestmark = pytest.mark.tier("all")

RAY = "ray==2.60.0"
PROGRAM = Path(__file__).with_name("ray_program.py")
SECONDS = 600


@pytest.fixture(scope="module")
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Ray and what it needs: vLLM finds it there, and no other test's vLLM does."""
    folder = tmp_path_factory.mktemp("ray")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    subprocess.run([*pip, "--target", folder, RAY], env={**os.environ, **constraints_of_tests()}, check=True)
    return folder


def test_generations_of_actors_are_recorded_under_the_rollouts_that_calls_and_urls_name(
    ray_folder: Path, tmp_path: Path
) -> None:
    store, told = tmp_path / "generations.db", tmp_path / "told.json"
    environment = {
        **without_agl(os.environ),
        **QUIET,
        "AGL_INSTRUMENT": "strict",
        "AGL_STORE": str(store),
        "AGL_RECORD_OFFLINE": "on",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(ray_folder)]),
    }
    arguments = (str(store), str(told), str(free_port()), str(tiny_model()), *SMALL, *LITTLE_CACHE, *NO_WORKER)
    command = (sys.executable, str(PROGRAM), *arguments)
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    with open_store(str(store), read_only=True) as opened:
        recorded = {each.rollout_id: each for each in opened.generations()}
    assert {name: list(each.choices[0].token_ids or ()) for name, each in recorded.items()} == json.loads(
        told.read_text()
    )
    assert {name: (each.endpoint, each.via) for name, each in recorded.items()} == {
        "ro-actor": ("AsyncLLM.generate", "process"),
        "ro-http": ("/v1/completions", "http"),
        "ro-first": ("LLM.generate", "process"),
        "ro-second": ("LLM.generate", "process"),
    }
    assert recorded["ro-actor"].attempt_id == "at-1"
