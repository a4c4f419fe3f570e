"""An environment for vLLM's own tests: a thin layer over one that has a vLLM, which is not changed.

It holds only what the tests need beside vLLM. Everything else comes from the environment beneath, and this package from
this checkout, whichever checkout the environment beneath was made for.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tools.make_env import CHECKOUT, run
from tools.upstream.source import FOLDER

__all__ = ["layered"]

REQUIREMENTS = (
    "pytest-asyncio==1.4.0",
    "pytest-mock==3.17.0",
    "pytest-timeout==2.4.0",
    "rapidfuzz==3.14.6",
    "tblib==3.2.2",
)
"""Installed without what they depend on, which is beneath, in the very versions that vLLM is there with."""
VLLM_COMMAND = """\
#!{python}
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def layered(version: str, beneath: Path, tests: Path) -> Path:
    """The folder of an interpreter, and of a command `vllm`, that have what is `beneath` and these `tests`."""
    folder = FOLDER / version / "environment"
    described = json.dumps([str(beneath), str(tests), str(CHECKOUT), REQUIREMENTS])
    note = folder / "is-there"
    if not note.exists() or note.read_text() != described:
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder, beneath, tests)
        note.write_text(described)
    return folder / "bin"


def _make(folder: Path, beneath: Path, tests: Path) -> None:
    log = folder.with_suffix(".log")
    uv = (sys.executable, "-m", "uv")
    python = folder / "bin" / "python"
    run("an environment for vLLM's tests", [*uv, "venv", "--python", beneath / "bin" / "python", folder], log)
    run("what they need", [*uv, "pip", "install", "--no-deps", "--python", python, *REQUIREMENTS], log)
    [ours] = folder.glob("lib/python*/site-packages")
    [theirs] = beneath.glob("lib/python*/site-packages")
    # Their `tests` before ours: both packages have the name, and servers that they start import some of theirs.
    lines = (str(tests), str(CHECKOUT), f"import site; site.addsitedir({str(theirs)!r})")
    (ours / "beneath.pth").write_text("\n".join(lines) + "\n")
    command = folder / "bin" / "vllm"
    command.write_text(VLLM_COMMAND.format(python=python))
    command.chmod(0o755)
