"""vLLM's Rust frontend: a binary that its own wheel carries, and its CPU build does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def rust_frontend() -> Path:
    """The binary for the vLLM that is installed, downloaded on the first call (330 MB) and kept in `.cache/`."""
    import vllm

    installed = Path(vllm.__file__).with_name("vllm-rs")
    if installed.exists():
        return installed
    version = vllm.__version__.partition("+")[0]
    binary = Path(__file__).parents[2] / ".cache" / f"vllm-rs-{version}"
    if not binary.exists():
        binary.parent.mkdir(exist_ok=True)
        # Made beside it and renamed: whoever is interrupted leaves no half a binary behind.
        with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
            os.replace(_extracted(_downloaded(f"vllm=={version}", Path(folder))), binary)
    return binary


def _downloaded(requirement: str, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-cache-dir")
    wheel_alone = ("--no-deps", "--only-binary=:all:", "--dest", folder, requirement)
    subprocess.run([*pip, *wheel_alone], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def _extracted(wheel: Path) -> Path:
    binary = wheel.with_name("vllm-rs")
    with zipfile.ZipFile(wheel) as archive, archive.open("vllm/vllm-rs") as packed, binary.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    binary.chmod(0o755)
    return binary
