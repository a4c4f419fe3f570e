"""The Debian packages that some tests need: `python -m tests.common.debian` prints the names of those that are missing.

Needs nothing but the standard library, and so no environment.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CHROMIUM", "FAKETIME", "NGINX", "POSTGRESQL", "Package", "skipped_parts"]


@dataclass(frozen=True)
class Package:
    """A program or library that Debian packages.

    Attributes:
        name: of the Debian package.
        title: what is in it.
        tests: what is skipped without it.
        find: gives the path of what the tests use, None where it is not there.
    """

    name: str
    title: str
    tests: str
    find: Callable[[], Path | None]

    @property
    def missing(self) -> str:
        """Say what is missing, and how to install it."""
        return f"{self.title} is not installed here: {_command(self)}"


def _initdb() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    elsewhere = shutil.which("initdb")
    if elsewhere and not found:
        found = [Path(elsewhere).resolve()]
    return found[-1] if found else None


def _libfaketime() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


def _chromium() -> Path | None:
    found = shutil.which("chromium")
    return Path(found) if found else None


def _nginx() -> Path | None:
    # Users other than root often have no /usr/sbin on their path.
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    return Path(found) if found else None


CHROMIUM = Package("chromium", "Chromium", "the page of agl store", _chromium)
FAKETIME = Package("faketime", "libfaketime", "differing clocks", _libfaketime)
POSTGRESQL = Package("postgresql", "PostgreSQL", "stores in PostgreSQL", _initdb)
NGINX = Package("nginx", "nginx", "the page behind nginx", _nginx)
PACKAGES = (CHROMIUM, FAKETIME, POSTGRESQL, NGINX)


def skipped_parts() -> list[str]:
    """Say at the start of the tests which parts are skipped here; nothing where all is installed."""
    missing = _missing()
    if not missing:
        return []
    parts = ", ".join(f"{package.tests} (no {package.title})" for package in missing)
    return [f"will be skipped: {parts}", f"to run them, too: {_command(*missing)}"]


def _missing() -> list[Package]:
    return [package for package in PACKAGES if package.find() is None]


def _command(*packages: Package) -> str:
    return f"apt-get install {' '.join(package.name for package in packages)}"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{package.name}\n" for package in _missing()))
