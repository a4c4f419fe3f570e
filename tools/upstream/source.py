"""vLLM's own tests, out of the source archive of a release."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.make_env import CHECKOUT, say

__all__ = ["FOLDER", "tests_of"]

FOLDER = CHECKOUT / ".cache" / "upstream"
PARTS = ("tests", "examples", "requirements", "pyproject.toml")
"""Parts of the source that the tests need. Its folder `vllm` would be imported in place of the installed one."""


def tests_of(version: str) -> Path:
    """The folder with the `tests` of a release, fetched the first time (50 MB).

    No archive, no network: the program ends.
    """
    folder = FOLDER / version / "source"
    if not folder.exists():
        say(f"fetching the source of vLLM {version} for its tests (50 MB)")
        unfinished = FOLDER / version / "download"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        source = _unpacked(version, unfinished)
        for part in PARTS:
            (source / part).rename(unfinished / part)
        shutil.rmtree(source.parent)
        unfinished.rename(folder)
    return folder


def _unpacked(version: str, folder: Path) -> Path:
    # pip unpacks an archive to ask what it needs; with --no-clean it leaves it there, whether or not it builds here.
    command = ("download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--no-clean", f"vllm=={version}")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *command],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "VLLM_TARGET_DEVICE": "empty"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [path.parent for path in folder.glob("pip-*/vllm_*/PKG-INFO") if (path.parent / "tests").is_dir()]
    if not found:
        sys.exit(f"pip brought no tests of vLLM {version}:\n{pip.stdout[-2000:]}{pip.stderr[-2000:]}")
    return found[0]
