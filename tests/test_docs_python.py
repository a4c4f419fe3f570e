"""The Python in the documentation, each block run as it stands there, against a server and a store of the tests.

Only addresses, ids, the model's name and the number of steps are others: what a reader has elsewhere is on free ports
here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentlightning.generation import Generation
from agentlightning.rollout_records import Rollout
from agentlightning.store import open_store
from tests.common.environments import CHECKOUT
from tests.common.generations import generation
from tests.common.vllm import QUIET, RemoteOpenAIServer, without_agl
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer
from tests.server.process import StoreServer
from tests.test_docs import ENGLISH, PAGES, Block, blocks
from tools.peer import peer
from tools.trainers import python_path

pytestmark = pytest.mark.tier("all")

SECONDS = 600
"""The most that one block may take: the longest starts an engine, which compiles its model."""
IMPORTED = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
PRINTS = {
    "print(answer.prompt_token_ids": r"^\[\d+(, \d+)+\] \[\[\d+, \d+, \d+, \d+\]\]$",
    "store.generations(": r"^array\('i', \[1, 2, 3\]\) \[array\('i', \[1, 2\]\)\]$",
    "store.tally(": r"^\{'finished': 2, 'aborted': 0, 'error': 0\}$",
    "store.triplets(": r"^array\('i', \[1, 2, 3\]\) array\('i', \[1, 2\]\) ",
    "status().items()": r"^server applied $",
    "/queues/rollouts/dequeue": r"^ro-[\w-]+ succeeded$",
    "in store.wait_for_rollouts(": r"^ro-[\w-]+ succeeded$",
    "import agent_loop_outputs": r"^\[1, 2\]\ntensor\(\[1\., 1\.\]",
    "import Gap": r"'responses': \(2, 2\)",
    "import generator_output": r"^\[\[1, 2\], \[2, 3\]\] \[False, True\]$",
    "import datums": r"^\[1, 2, 3, 1\] \[0\. 0\. 0\. 0\.\]$",
    "import documents": r'^\{"schema_version": "ATIF-v1\.8", "session_id": "ro-',
}
"""A line that a block with this code prints, as a pattern."""
TRAINERS = {"trl", "verl", "skyrl", "tinker", "atif"}
"""Packages that are installed beside the tests' environment; our adapter for each has the same name."""
ADAPTER = re.compile(r"agentlightning\.trainers\.(\w+)")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the store of the documentation."""
    return tmp_path_factory.mktemp("docs") / "generations.db"


@pytest.fixture(scope="module")
def rollout_id(file: Path) -> str:
    """The id of the rollout that the documentation calls ROLLOUT."""
    with open_store(str(file)) as store:
        rollout = store.start_rollout("a task")
        store.add(recorded(rollout))
        rollout.reward(1.0)
        rollout.finish("succeeded")
    return rollout.rollout_id


def recorded(rollout: Rollout) -> list[Generation]:
    assert rollout.attempt is not None
    named: dict[str, Any] = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    found = [generation(number, model="Qwen/Qwen3-0.6B", prompt=3, output=2, **named) for number in (1, 2)]
    for each in found:
        each.choices[0].logprobs = array("f", [-0.5, -1.5])
    return found


@pytest.fixture(scope="module")
def filled(file: Path, rollout_id: str) -> Iterator[StoreServer]:
    """`agl store` over the file in which that rollout is; beside the file is its export."""
    with StoreServer(file) as server:
        exported = file.with_name("rollout.jsonl")
        export = (sys.executable, "-m", "agentlightning", "export", "--store", str(file), "--output", str(exported))
        subprocess.run(export, check=True)
        yield server


@pytest.fixture(scope="module")
def taught(filled: StoreServer, nursery: Nursery) -> Iterator[RecordingServer]:
    """A vLLM that records logprobs to that store, and takes weights."""
    env = {"AGL_LOGPROBS": "on", "VLLM_SERVER_DEV_MODE": "1"}
    with nursery.server(filled.path, store=filled.url, env=env) as server:
        yield server


def each_block() -> list[object]:
    """The blocks of the English pages; those that import what is not installed here are skipped, and say so."""
    found = []
    for block in blocks("python", pages=tuple(page for page in PAGES if page.name != "README.zh.md")):
        imported = set(IMPORTED.findall(block.text))
        missing = sorted(name for name in imported - TRAINERS if importlib.util.find_spec(name) is None)
        marks = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
        found.append(pytest.param(block, id=f"{block.page.name}:{block.line}", marks=marks))
    return found


@pytest.mark.parametrize("block", each_block())
def test_a_python_block_does_what_its_page_says(
    block: Block,
    armed: RemoteOpenAIServer,
    filled: StoreServer,
    rollout_id: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    text = block.text.replace("http://127.0.0.1:4747", filled.url).replace("max_steps=100", "max_steps=1")
    text = text.replace('"ROLLOUT"', f'"{rollout_id}"')
    server: RemoteOpenAIServer = request.getfixturevalue("taught") if "load_weights" in text else armed
    text = text.replace("http://localhost:8000", server.url)
    if "chat.completions" in text or "LLM(" in text:
        text = text.replace("Qwen/Qwen3-0.6B", server.model)
    # What its page calls so is Agent Lightning 0.3, which has the name of this package.
    python = str(peer() / "python") if "LightningStoreClient" in text else sys.executable
    # On CPUs an engine takes nearly all memory, and none where others have some of it already.
    env = {**without_agl(os.environ), **QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if "LightningStoreClient" not in text:
        env["PYTHONPATH"] = str(CHECKOUT)
    if TRAINERS & {*IMPORTED.findall(text), *ADAPTER.findall(text)}:
        env["PYTHONPATH"] = python_path()
    (tmp_path / "block.py").write_text(text)

    status, output, errors = ran([python, tmp_path / "block.py"], filled.path.parent, env, tmp_path)

    assert status == 0, errors
    for code, printed in PRINTS.items():
        if code in text:
            assert re.search(printed, output, re.MULTILINE), output


def ran(command: Sequence[str | Path], folder: Path, env: Mapping[str, str], logs: Path) -> tuple[int, str, str]:
    """Run a program, and return its status, output and errors; one that hangs is ended with all that it has started."""
    out, err = logs / "stdout", logs / "stderr"
    # Files instead of pipes: these stay open as long as an engine that the program has left behind.
    with out.open("wb") as output, err.open("wb") as errors:
        program = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=errors, start_new_session=True)
        try:
            program.wait(SECONDS)
        except subprocess.TimeoutExpired:
            errors.write(f"\nit had not ended after {SECONDS} seconds\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            status = program.wait()
    return status, out.read_text(), err.read_text()


def test_each_of_the_lines_that_are_expected_is_of_a_block() -> None:
    texts = [block.text for block in blocks("python")]

    assert ENGLISH in PAGES
    assert all(any(code in text for text in texts) for code in PRINTS)
