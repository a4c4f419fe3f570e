"""The locks: exact versions of all that an environment is made of, and nothing of where they came from."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.common.environments import virtual_environment
from tools import lock
from tools.agentops import REQUIREMENTS as AGENTOPS
from tools.agentops import agentops
from tools.lock import ENVIRONMENT, Lock, is_newest, mark
from tools.make_env import TESTED_PYTHON
from tools.peer import REQUIREMENTS as PEER
from tools.peer import peer

LINE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][a-z0-9.+!]*")
HAS_LOCK = mark(Path(sys.prefix)).exists() and not is_newest() and sys.version_info[:2] == TESTED_PYTHON


@pytest.mark.parametrize("name", ["environment", "peer", "agentops"])
def test_each_line_is_an_exact_version_and_no_address(name: str) -> None:
    text = Lock(name).path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]

    assert len(lines) > 20
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    assert "://" not in text


@pytest.mark.skipif(not HAS_LOCK, reason="this environment was not made with the lock")
def test_what_make_installs_is_what_the_lock_names() -> None:
    assert ENVIRONMENT.installed(Path(sys.executable)) == ENVIRONMENT.versions()


@pytest.mark.skipif(not HAS_LOCK, reason="this environment was not made with the lock")
def test_what_the_lock_names_is_for_the_first_python_of_its_version_too() -> None:
    """Debian 12 has 3.11.2."""
    first = "{}.{}.0".format(*TESTED_PYTHON)

    assert [
        each.name
        for each in distributions()
        if "Requires-Python" in each.metadata and first not in SpecifierSet(each.metadata["Requires-Python"])
    ] == []


@pytest.mark.skipif(not HAS_LOCK, reason="this environment was not made with the lock")
@pytest.mark.parametrize(("name", "make"), [("peer", peer), ("agentops", agentops)])
def test_what_the_peers_are_made_of_is_what_their_locks_name(name: str, make: Callable[[], Path]) -> None:
    assert Lock(name).installed(make() / "python") == Lock(name).versions()


@pytest.mark.parametrize(("name", "requirements"), [("peer", PEER), ("agentops", AGENTOPS)])
def test_the_lock_of_a_peer_fits_what_is_asked_for(name: str, requirements: tuple[str, ...]) -> None:
    versions = Lock(name).versions()

    for requirement in requirements:
        package, _, version = requirement.partition("==")
        assert f"{versions[package]}.".startswith(version.removesuffix("*"))


def test_a_lock_is_written_from_what_is_installed_and_only_where_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    environment = virtual_environment(tmp_path / "environment")

    def install(name: str, version: str) -> None:
        shutil.rmtree(info := environment.site_packages / f"{name}.dist-info", ignore_errors=True)
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    written = Lock("some", {"a-checkout"})
    for name, version in (("b_package", "2.0+cpu"), ("A.Package", "1.0"), ("a-checkout", "3")):
        install(name, version)

    assert written.write(environment.python)
    assert written.versions() == {"a-package": "1.0", "b-package": "2.0+cpu"}
    before = written.path.read_text()
    assert not written.write(environment.python)
    assert written.path.read_text() == before

    install("A.Package", "1.1")
    install("c", "1")
    assert written.differences(environment.python) == ["a-package 1.1 (locked: 1.0)", "c 1 (locked: no line)"]
    assert written.write(environment.python)
    assert written.versions() == {"a-package": "1.1", "b-package": "2.0+cpu", "c": "1"}
    assert written.differences(environment.python) == []
