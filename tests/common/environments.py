"""Environments that hold nothing but what a test installs into them: real builds, real pip, any Python."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.lock import constraints_of_tests

CHECKOUT = Path(__file__).parents[2]

OUR_MODULES = "import sys; print(*sorted(name for name in sys.modules if name.split('.')[0] == 'agentlightning'))"
OUR_FINDERS = "import sys; print(sum(type(f).__module__ == '_agentlightning' for f in sys.meta_path))"


def run(*command: str | Path, **variables: str) -> str:
    """Run a command and return its output, with stderr; fail if it fails.

    pip and uv install the versions of the tests' environment.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "PYTHON"))}
    result = subprocess.run(
        command,
        env={**inherited, **constraints_of_tests(), **variables},
        # Not the checkout, which `-c` and `-m` would import from.
        cwd=sys.prefix,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment. Packages are installed by the pip of the tests' environment, so that it needs none.

    Args:
        folder: holds all that is installed.
        python: the interpreter that sees it.
        variables: what that takes besides, of environment variables.
    """

    folder: Path
    python: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def scripts(self) -> Path:
        return self.folder / "bin"

    @property
    def site_packages(self) -> Path:
        (site_packages,) = self.folder.glob("lib/python*/site-packages")
        return site_packages

    def pip(self, command: str, *arguments: str | Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, command, "--disable-pip-version-check", "-q")
        # It runs in this environment's Python, and would leave that one's bytecode in the tests' environment.
        run(*pip, *arguments, PYTHONDONTWRITEBYTECODE="1", **self.variables)

    def run(self, *command: str | Path, **variables: str) -> str:
        return run(*command, **self.variables, **variables)

    def execute(self, code: str, **variables: str) -> str:
        return self.run(self.python, "-c", code, **variables)

    def paths(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


def virtual_environment(folder: Path, python: str | Path = sys.executable, *options: str) -> Environment:
    """A new one of `python`'s, without pip; `options` are those of `python -m venv`."""
    run(python, "-m", "venv", "--without-pip", *options, folder)
    return Environment(folder, folder / "bin" / "python")


def build(into: Path, *arguments: str) -> Path:
    """The wheel that `python -m build` makes of the checkout; without arguments it makes an sdist, and it of that."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, *arguments, CHECKOUT)
    (wheel,) = into.glob("*.whl")
    return wheel


def made_up_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], script: str) -> Path:
    """A wheel that holds `files`, and a console script such as `"command = module:function"`."""
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{script}\n",
    }
    record = f"{info}/RECORD"
    entries = "".join(f"{path},,\n" for path in (*files, *metadata, record))
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, **metadata, record: entries}.items():
            archive.writestr(path, text)
    return wheel
