"""The command `agl`, as whoever types it sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import agentlightning
from agentlightning.modules import locate

CHECKOUT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
WAYS_TO_CALL = {"agl vllm": ("agl", "vllm"), "python -m": ("python", "-m", "agentlightning.cli.vllm")}
SECONDS = 120

VLLM_SCRIPT = """\
#!{python}
import sys
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
VLLM_MAIN = """\
import json, os, sys

def main():
    said = {
        "program": os.path.basename(sys.argv[0]),
        "arguments": sys.argv[1:],
        "process": os.getpid(),
        "interpreter": sys.executable,
        "AGL_INSTRUMENT": os.environ.get("AGL_INSTRUMENT"),
        "armed": "agentlightning.importhook" in sys.modules,
    }
    print(json.dumps(said), flush=True)
    match sys.argv[1:]:
        case ["exit", status]:
            sys.exit(int(status))
        case ["read stdin"]:
            print(sys.stdin.read(), end="")

if __name__ == "__main__":
    main()
"""


def variables(**changes: str) -> dict[str, str]:
    inherited = {n: value for n, value in os.environ.items() if not n.startswith(("AGL_", "PYTHONPATH", "PYTHONHOME"))}
    return inherited | changes


def run(*command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=variables(**changes),
        # Not the checkout, which `-m` would import from.
        cwd=sys.prefix,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def agl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(SCRIPTS / "agl", *arguments)


def vllm_said(command: list[str | Path], *arguments: str, **changes: str) -> dict[str, Any]:
    result = run(*command, *arguments, **changes)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def one_line_of(result: subprocess.CompletedProcess[str]) -> str:
    """What a command that gives up says: one line on stderr, nothing on stdout, and status 1."""
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    return line


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that holds this package and nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    for command in (
        (sys.executable, "-m", "venv", "--without-pip", environment),
        (*pip, "install", "--disable-pip-version-check", "-q", "--no-deps", CHECKOUT),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stderr
    return environment / "bin"


@pytest.fixture(params=WAYS_TO_CALL)
def agl_vllm(request: pytest.FixtureRequest, scripts: Path) -> list[str | Path]:
    """Each way to call `agl vllm`, in an environment without vLLM."""
    program, *arguments = WAYS_TO_CALL[request.param]
    return [scripts / program, *arguments]


@pytest.fixture(params=["with its script", "without its script"])
def stand_in(request: pytest.FixtureRequest, scripts: Path, agl_vllm: list[str | Path]) -> Iterator[list[str | Path]]:
    """Each way to call `agl vllm`, where a stand-in for vLLM is installed: it only tells how it was started.

    With its script, as pip installs it, or only its package, as where another environment's packages are visible.
    """
    python = scripts / "python"
    (site_packages,) = scripts.parent.glob("lib/python*/site-packages")
    ...
    yield agl_vllm
