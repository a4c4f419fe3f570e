"""`import agentlightning`: what it offers, and what it costs."""

from __future__ import annotations

import doctest
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import agentlightning as agl
from agentlightning import errors, store
from agentlightning.store import interface

pytestmark = pytest.mark.tier("check")


@pytest.mark.parametrize("name", agl.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert name in dir(agl)
    if name != "__version__":
        assert getattr(agl, name).__doc__


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys; before = {*sys.modules}; import agentlightning; print(*sorted({*sys.modules} - before))"
    environment = {"PATH": "/usr/bin:/bin"}

    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert {name.partition(".")[0] for name in output.stdout.split()} <= {"_agentlightning", "agentlightning"}
    assert not [name for name in output.stdout.split() if name.startswith("agentlightning.")]


def test_help_shows_the_public_names() -> None:
    text = pydoc.plain(pydoc.render_doc(agl))

    assert "open_store" in text
    assert "dequeue_rollout" in text


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        agl.no_such_name  # noqa: B018  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "AgentLightningError"])
def test_every_error_is_caught_as_an_error_of_this_package(name: str) -> None:
    assert issubclass(getattr(agl, name), agl.AgentLightningError)
    assert issubclass(getattr(agl, name), agl.StoreError | agl.TrainingError)


@pytest.mark.parametrize("module", [store, interface])
def test_examples_of_the_public_interface_run(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    results = doctest.testmod(module, extraglobs={"open_store": agl.open_store})

    assert results.attempted > 0
    assert results.failed == 0
