"""The versions that an environment is made with: a file each in `tools/locks`, which pip and uv read as constraints.

`make lock` writes them from the environments that were tested. `make test NEWEST=1` makes environments without them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from datetime import date, datetime, timezone
from pathlib import Path

__all__ = ["ENVIRONMENT", "Lock", "as_lines", "constraints_of_tests", "is_newest", "mark", "newest"]

FOLDER = Path(__file__).parent / "locks"
HEADER = """\
# Written by `make lock` from an environment of Python {python} that was tested; pip and uv read it as constraints.
# To change one version, change or remove its line, then `make lock`. To take the newest of everything:
# `make test NEWEST=1`, then `make lock NEWEST=1`.
# Written at {time}.
"""
_NEWEST = "the newest of"
_LIST = """
import importlib.metadata
for distribution in importlib.metadata.distributions():
    print(distribution.metadata["Name"] + "==" + distribution.version)
"""


class Lock:
    """A file with the exact version of each distribution of one environment.

    Args:
        name: the file's name in `tools/locks`, without `.txt`.
        not_from_an_index: distributions that are in the environment, but have no line.
    """

    def __init__(self, name: str, not_from_an_index: Collection[str] = ()) -> None:
        self.path = FOLDER / f"{name}.txt"
        self._left_out = not_from_an_index

    def versions(self) -> dict[str, str]:
        """Each distribution's version, by its normalised name."""
        lines = (line for line in self.path.read_text().splitlines() if not line.startswith("#"))
        return dict(line.split("==") for line in lines)

    def installed(self, python: Path) -> dict[str, str]:
        """Return the version of each distribution that this interpreter has, by its normalised name."""
        listed = subprocess.run([python, "-I", "-c", _LIST], capture_output=True, text=True, check=True).stdout
        found = dict(line.split("==") for line in listed.splitlines())
        normalised = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}
        return {name: normalised[name] for name in sorted(normalised.keys() - self._left_out)}

    def differences(self, python: Path) -> list[str]:
        """Return the packages of this interpreter whose version differs from the lock, or that the lock lacks."""
        versions = self.versions()
        return [
            f"{name} {version} (locked: {versions.get(name, 'no line')})"
            for name, version in self.installed(python).items()
            if versions.get(name) != version
        ]

    def write(self, python: Path) -> bool:
        """Write the versions that this interpreter has; return whether the file changed."""
        installed = self.installed(python)
        if self.path.exists() and installed == self.versions():
            return False
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        header = HEADER.format(python="{}.{}".format(*sys.version_info), time=time)
        self.path.write_text(header + as_lines(installed))
        return True

    def written_at(self) -> str:
        """Return when the file was written, in ISO 8601. Packages uploaded later were not tested."""
        found = re.search(r"^# Written at (\S+)\.$", self.path.read_text(), re.MULTILINE)
        assert found, f"{self.path} does not say when it was written"
        return found[1]


# The checkout itself, and metadata that names the CPU build `vllm`.
ENVIRONMENT = Lock("environment", {"agentlightning", "vllm"})
"""The lock of the environment that `make` makes."""


def as_lines(versions: Mapping[str, str]) -> str:
    """Format versions as constraints for pip and uv."""
    return "".join(f"{name}=={version}\n" for name, version in versions.items())


def mark(environment: Path) -> Path:
    """The file of an environment that says what it was made with: its lock's text, or what `newest` says."""
    return environment / "made-with"


def newest() -> str:
    """Return the text of `mark` for an environment without a lock. It has the date, since versions change daily."""
    return f"{_NEWEST} {date.today()}\n"


def is_newest() -> bool:
    """Tell whether this environment was made without a lock, with the newest of everything."""
    made_with = mark(Path(sys.prefix))
    return made_with.exists() and made_with.read_text().startswith(_NEWEST)


def constraints_of_tests() -> Mapping[str, str]:
    """Environment variables with which pip and uv install no other versions than those of the tests' environment."""
    if is_newest():
        return {}
    path = str(ENVIRONMENT.path)
    return {
        "PIP_CONSTRAINT": path,
        "PIP_BUILD_CONSTRAINT": path,
        "UV_CONSTRAINT": path,
        "UV_BUILD_CONSTRAINT": path,
        # `uv sync` reads no constraints.
        "UV_EXCLUDE_NEWER": ENVIRONMENT.written_at(),
    }
