"""Installing and uninstalling the package: real builds, real pip, environments made for it."""

from __future__ import annotations

import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import agentlightning
from tests.common.environments import (
    CHECKOUT,
    OUR_FINDERS,
    OUR_MODULES,
    Environment,
    build,
    made_up_wheel,
    run,
    virtual_environment,
)

pytestmark = pytest.mark.tier("all")

PACKAGE = CHECKOUT / "agentlightning"
DIST_INFO = f"agentlightning-{agentlightning.__version__}.dist-info"
WAYS_TO_INSTALL = ("wheel", "folder", "editable")

DISTRIBUTIONS = (
    "from importlib.metadata import distributions as d; print(*sorted(f'{x.name}=={x.version}' for x in d()))"
)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def wheel_of_the_other_agentlightning(folder: Path) -> Path:
    files = {"agentlightning/__init__.py": "", "agentlightning/theirs.py": "def main():\n    print('theirs')\n"}
    return made_up_wheel(folder, "agentlightning", "0.3.0", files, "agl = agentlightning.theirs:main")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def install(wheel: Path) -> Callable[[Environment, str], None]:
    def install(environment: Environment, way: str) -> None:
        what = {"wheel": [wheel], "folder": [CHECKOUT], "editable": ["-e", CHECKOUT]}[way]
        environment.pip("install", "--no-deps", *what)

    return install


@pytest.fixture(scope="module", params=WAYS_TO_INSTALL)
def installed(
    request: pytest.FixtureRequest,
    install: Callable[[Environment, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    """An environment that holds nothing but the package, installed in each way in turn."""
    environment = virtual_environment(tmp_path_factory.mktemp(request.param))
    install(environment, request.param)
    return environment


def test_the_wheel_holds_the_package_the_pth_and_nothing_else(wheel: Path) -> None:
    package = {
        path.relative_to(CHECKOUT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    metadata = {f"{DIST_INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}

    assert contents(wheel).keys() == package | metadata | {
        "agentlightning.pth",
        "_agentlightning.py",
        f"{DIST_INFO}/licenses/LICENSE",
    }
    assert "agentlightning/py.typed" in package


def test_the_wheel_holds_the_pth_and_the_license_as_they_are(wheel: Path) -> None:
    files = contents(wheel)

    assert files["agentlightning.pth"] == (CHECKOUT / "agentlightning.pth").read_bytes()
    assert files[f"{DIST_INFO}/licenses/LICENSE"] == (CHECKOUT / "LICENSE").read_bytes()


def test_a_wheel_built_from_the_sdist_is_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert contents(build(tmp_path)) == contents(wheel)


def test_the_pth_is_at_the_top_of_site_packages(installed: Environment) -> None:
    pth = installed.site_packages / "agentlightning.pth"

    assert pth.read_bytes() == (CHECKOUT / "agentlightning.pth").read_bytes()


@pytest.mark.parametrize("value", ["1", "strict", "On", "yes", " true "])
def test_an_interpreter_is_armed_where_the_variable_asks_for_it(installed: Environment, value: str) -> None:
    assert installed.execute(OUR_FINDERS, AGL_INSTRUMENT=value) == "1\n"


@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "OFF", "No"])
def test_interpreter_with_the_variable_off_imports_no_module_of_the_package(
    installed: Environment, value: str | None
) -> None:
    variables = {} if value is None else {"AGL_INSTRUMENT": value}

    assert installed.execute(OUR_MODULES, **variables) == "\n"


def test_a_venv_has_one_finder_however_often_it_runs_the_pth(installed: Environment) -> None:
    assert installed.execute(OUR_FINDERS, AGL_INSTRUMENT="1") == "1\n"


def test_agl_runs(installed: Environment) -> None:
    assert run(installed.scripts / "agl", "--version") == f"agl {agentlightning.__version__}\n"


@pytest.mark.parametrize("way", WAYS_TO_INSTALL)
def test_uninstalling_takes_everything_away(
    install: Callable[[Environment, str], None], way: str, tmp_path: Path
) -> None:
    environment = virtual_environment(tmp_path)
    # pip takes a folder away that it leaves empty, site-packages too.
    (environment.site_packages / "neighbour.py").touch()
    before = environment.paths()
    install(environment, way)
    assert f"{environment.site_packages.relative_to(tmp_path)}/agentlightning.pth" in environment.paths()

    environment.pip("uninstall", "-y", "agentlightning")

    assert environment.paths() == before
    assert environment.execute("pass", AGL_INSTRUMENT="1") == ""


def test_installing_changes_no_other_version_in_the_environment_of_vllm(wheel: Path, tmp_path: Path) -> None:
    # Links, and none to the package that is being tested, so that pip finds all of that environment but can
    # change nothing in it.
    visible = tmp_path / "visible"
    visible.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "agentlightning" not in entry.name:
                (visible / entry.name).symlink_to(entry)
    environment = virtual_environment(tmp_path / "environment")
    (environment.site_packages / "visible.pth").write_text(f"{visible}\n")
    before = environment.execute(DISTRIBUTIONS).split()
    assert any(distribution.startswith("pydantic==") for distribution in before)

    environment.pip("install", wheel)

    after = environment.execute(DISTRIBUTIONS).split()
    assert after == sorted([*before, f"agentlightning=={agentlightning.__version__}"])


def test_installing_replaces_another_distribution_of_the_same_name(wheel: Path, tmp_path: Path) -> None:
    environment = virtual_environment(tmp_path / "environment")
    environment.pip("install", wheel_of_the_other_agentlightning(tmp_path))
    assert run(environment.scripts / "agl") == "theirs\n"

    environment.pip("install", "--no-deps", wheel)

    assert run(environment.scripts / "agl", "--version") == f"agl {agentlightning.__version__}\n"
    assert environment.execute(DISTRIBUTIONS) == f"agentlightning=={agentlightning.__version__}\n"
    assert not (environment.site_packages / "agentlightning" / "theirs.py").exists()
