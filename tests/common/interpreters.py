"""The Pythons of this machine that the package is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["THIS_PYTHON", "VERSIONS", "find_python"]

THIS_PYTHON = "{}.{}".format(*sys.version_info)
VERSIONS = sorted({"3.10", "3.11", "3.12", "3.13", "3.14", THIS_PYTHON}, key=lambda name: int(name.partition(".")[2]))
"""Versions that `requires-python` allows."""


def find_python(version: str) -> Path | None:
    """An interpreter that runs: this one, one on the path, or one that pyenv or uv keeps; None where there is none."""
    if version == THIS_PYTHON:
        return Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv"), "versions").expanduser()
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python")).expanduser()
    folders = [
        *map(Path, os.get_exec_path()),
        *pyenv.glob(f"{version}.*/bin"),
        *uv.glob(f"cpython-{version}.*/bin"),
    ]
    return next((python for folder in folders if _runs(python := folder / f"python{version}", version)), None)


def _runs(python: Path, version: str) -> bool:
    # pyenv puts a command on the path for versions, too, that are not switched on: it fails.
    code = "import sys, venv; print('{}.{}'.format(*sys.version_info))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return False
    return result.stdout.strip() == version
