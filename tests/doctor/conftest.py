"""Environments with the package and a made-up vLLM, each test's its own, to be spoiled."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import annotated_types
import pydantic
import pydantic_core
import pytest
import sqlalchemy
import typing_extensions
import typing_inspection

from tests.common.environments import Environment, build, virtual_environment
from tests.common.made_up_vllm import VERSION, made_up_vllm
from tests.doctor.command import write_dist_info

# As vLLM does it.
PLUGINS = """\
import os
from importlib.metadata import entry_points

def load_general_plugins():
    allowed = os.environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in os.environ else None
    for plugin in entry_points(group="vllm.general_plugins"):
        if allowed is None or plugin.name in allowed:
            plugin.load()()
"""


def write_vllm(folder: Path, edits: Mapping[str, str] | None = None) -> None:
    """The made-up vLLM, with plugins."""
    made_up_vllm(folder, "from 0.33", edits)
    (folder / "vllm" / "plugins.py").write_text(PLUGINS)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="session")
def pristine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = virtual_environment(tmp_path_factory.mktemp("pristine"))
    environment.pip("install", "--no-deps", wheel)
    for library in (pydantic, pydantic_core, annotated_types, typing_inspection, sqlalchemy):
        folder = Path(library.__path__[0])
        (environment.site_packages / folder.name).symlink_to(folder)
    (environment.site_packages / "typing_extensions.py").symlink_to(typing_extensions.__file__)
    write_vllm(environment.site_packages)
    write_dist_info(environment.site_packages, "vllm", VERSION, ["vllm/__init__.py"])
    return environment


@pytest.fixture
def environment(pristine: Environment, tmp_path: Path) -> Environment:
    """A virtual environment in which all is well."""
    folder = tmp_path / "environment"
    shutil.copytree(pristine.folder, folder, symlinks=True)
    return Environment(folder, folder / "bin" / "python")
