"""The commands that read a store, with no more than a plain installation has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from agentlightning.generation import Generation
from agentlightning.store import open_store
from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl
from tests.server.process import StoreServer

tomllib = pytest.importorskip("tomllib", reason="before Python 3.11 there is none")

NAME = re.compile(r"[\w.-]+")
SECONDS = 120


def needed() -> set[str]:
    """Return the names of the distributions that a plain installation brings."""
    waiting = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        match = NAME.match(requirement)
        assert match is not None
        if match[0] not in found and "extra ==" not in requirement:
            try:
                waiting += distribution(match[0]).requires or ()
            except ModuleNotFoundError:
                # Of another platform.
                continue
            found.add(match[0])
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has this package, what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    for name in ("agentlightning", "_agentlightning.py"):
        (folder / name).symlink_to(CHECKOUT / name)
    for name in needed():
        of_it = distribution(name)
        for top in {file.parts[0] for file in of_it.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (folder / top).symlink_to(Path(str(of_it.locate_file(top))))
    return folder


def agl(plain: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: without the packages of the environment that runs this.
    return subprocess.run(
        [sys.executable, "-S", "-m", "agentlightning", *arguments],
        env={**without_agl(os.environ), "PYTHONPATH": str(plain)},
        cwd=plain,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_a_store_over_http_is_read_without_any_extra(plain: Path, tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        with open_store(server.url) as store:
            store.add([Generation(request_id="1", finished_at=1, status="finished")])
        exported = agl(plain, "export", "--store", server.url)
        examined = agl(plain, "doctor", "--store", server.url)

    assert (exported.returncode, exported.stderr) == (0, "agl export: generations written to stdout: 1\n")
    assert "1 finished" in examined.stdout
    assert "pip install" not in examined.stdout + examined.stderr


def test_the_extras_are_not_in_it(plain: Path, tmp_path: Path) -> None:
    served = agl(plain, "store", "--store", str(tmp_path / "store.db"))

    assert served.returncode == 1
    assert "a package is missing" in served.stderr
