"""vLLM's releases on the package index: which there are, their wheels, and the source in them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["download", "releases", "source"]

# vLLM has changed several times what its wheels are for.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in reversed(range(5, 42))),
    *(f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")),
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def releases() -> list[str]:
    """All releases of vLLM, the newest first."""
    said = _output(*PIP, "index", "versions", "vllm")
    [line] = (line for line in said.splitlines() if line.startswith("Available versions: "))
    return line.removeprefix("Available versions: ").split(", ")


def download(version: str, folder: Path) -> Path:
    """Download the wheel of a release, some 300 MB, and nothing that it needs; returns the file.

    Raises:
        ValueError: where the index has none.
    """
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    python = ("--python-version=3.12", "--implementation=cp", "--abi=abi3", "--abi=cp312")
    try:
        _output(
            *(*PIP, "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", *platforms, *python),
            *("--dest", str(folder), f"vllm=={version}"),
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"no wheel of vLLM {version}: {reason}") from None
    [wheel] = folder.glob("vllm-*.whl")
    return wheel


def source(version: str, cache: Path) -> Path:
    """The Python source of a release: a zip file in `cache`, made of its wheel the first time.

    Raises:
        ValueError: where the index has none.
    """
    kept = cache / f"vllm-{version}.zip"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            keep_source(download(version, Path(folder)), kept)
    return kept


def keep_source(wheel: Path, kept: Path) -> None:
    """Copy what is Python out of a wheel into a zip file: a tenth of it or less."""
    unfinished = kept.with_suffix(".part")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as part:
        for name in whole.namelist():
            if name.endswith(".py"):
                part.writestr(name, whole.read(name))
    os.replace(unfinished, kept)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
