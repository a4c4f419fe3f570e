"""Each adapter's rows, given to the trainer's own code: a program each, in the environment that has the trainers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl
from tools.trainers import python_path

pytestmark = pytest.mark.tier("all")


@pytest.fixture(scope="module")
def trainers() -> str:
    return python_path()


ROWS = ("trl_rows", "verl_rows", "verl_loop", "skyrl_rows", "tinker_rows", "atif_rows")
STEPS = ("verl_step", "skyrl_step")


@pytest.mark.parametrize("program", [*ROWS, *STEPS])
def test_the_trainers_own_code_accepts_the_rows_and_learns_from_them(program: str, trainers: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.trainers.programs.{program}"],
        cwd=CHECKOUT,
        env={**without_agl(os.environ), "PYTHONPATH": trainers},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
