"""The commands and programs of the README and the quick start, pasted block by block beside a real vLLM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.common.environments import CHECKOUT
from tests.common.pace import not_counted
from tests.recording.nursery import Nursery
from tests.server.process import StoreServer
from tests.test_docs import CHINESE, ENGLISH, Block, blocks

START = CHECKOUT / "docs" / "index.md"
SERVED = re.compile(r"vllm serve ([\w.-]+/[\w.-]+)")
ASKED = re.compile(r"\"model\": \"([^\"]+)\"|model=\"([^\"]+)\"")
SERVERS = re.compile(r"^(?:agl store|.*vllm serve \S+)$", re.MULTILINE)
MADE_BEFORE = ("pip ", "make ")
"""Beginnings of the blocks that set up the environment, which the tests have."""
SECONDS = 120


@dataclass(frozen=True)
class Pasted:
    """A block that was run in a folder, and all that it printed."""

    block: Block
    folder: Path
    status: int
    output: str


def to_paste(page: Path) -> list[Block]:
    """List the blocks of a page that a reader pastes while its servers run."""
    found = blocks("bash", "python", pages=(page,))
    return [each for each in found if not SERVERS.search(each.text) and not each.text.startswith(MADE_BEFORE)]


@pytest.mark.tier("check")
@pytest.mark.parametrize("page", [ENGLISH, CHINESE, START], ids=lambda page: page.name)
def test_every_example_asks_for_the_model_that_is_served(page: Path) -> None:
    text = page.read_text()
    asked = {name for names in ASKED.findall(text) for name in names if name}

    assert asked == set(SERVED.findall(text))


@pytest.mark.tier("check")
@pytest.mark.parametrize("page", [ENGLISH, CHINESE, START], ids=lambda page: page.name)
def test_each_server_has_a_block_of_its_own(page: Path) -> None:
    for block in blocks("bash", pages=(page,)):
        if SERVERS.search(block.text):
            # The next line would wait until the server ends.
            assert block.text.count("\n") == 1, block


@pytest.fixture(scope="module", params=[ENGLISH, START], ids=lambda page: page.stem)
def pasted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> list[Pasted]:
    """Run the blocks of a page, one after the other."""
    folder = tmp_path_factory.mktemp("pasted")
    with (
        not_counted(),
        StoreServer(folder / "store.db") as store,
        nursery.server(folder / "store.db", store=store.url) as vllm,
    ):
        return [paste(each, folder, store.url, vllm.url, vllm.model) for each in to_paste(request.param)]


def paste(block: Block, folder: Path, store: str, vllm: str, model: str) -> Pasted:
    """Run a block where the servers have other ports, and the model is the tiny one."""
    text = block.text.replace("http://127.0.0.1:4747", store).replace("Qwen/Qwen3-0.6B", model)
    text = text.replace("http://localhost:8000", vllm).replace("localhost:8000", vllm.removeprefix("http://"))
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if "ro-1" in text:
        # Reading takes a person longer than recording.
        wait_for_call(store)
    return Pasted(block, folder, result.returncode, result.stdout)


def wait_for_call(store: str) -> None:
    with open_store(store) as opened:
        while not list(opened.generations(rollout_id="ro-1")):
            time.sleep(0.05)


def test_every_block_works_when_it_is_pasted(pasted: list[Pasted]) -> None:
    assert len(pasted) >= 3
    for each in pasted:
        assert each.status == 0, (each.block, each.output)


def test_every_answer_has_ids(pasted: list[Pasted]) -> None:
    answers = [each for each in pasted if "/chat/completions" in each.block.text]

    assert answers
    for each in answers:
        assert '"response_token_ids":[[' in each.output


def test_a_rewarded_rollout_is_printed_with_its_ids_and_reward(pasted: list[Pasted]) -> None:
    programs = [each.output for each in pasted if "open_store" in each.block.text]
    shells = [each.output for each in pasted if "/reward" in each.block.text]

    assert programs
    for output in programs:
        assert re.search(r"^array\('i', \[.+\]\) array\('i', \[.+\]\) [01]\.0$", output, re.MULTILINE)
    for output in shells:
        assert re.search(r'"response_token_ids":\[\d.*"reward":1\.0', output)


def test_an_export_to_a_file_has_the_call(pasted: list[Pasted]) -> None:
    for each in pasted:
        for name in re.findall(r"agl export .*-o (\S+)", each.block.text):
            assert '"rollout_id":"ro-1"' in (each.folder / name).read_text().replace('": "', '":"')
