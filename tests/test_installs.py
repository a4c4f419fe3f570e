"""Each way to install the package, and each Python that it is for: what starts armed there, and what does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import agentlightning
from agentlightning import instrumentation
from agentlightning.instrumentation.vllm import continuation, sampling
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
from tests.common.interpreters import THIS_PYTHON, VERSIONS, find_python
from tests.common.made_up_vllm import made_up_vllm

pytestmark = pytest.mark.tier("all")

WITH_UV = {
    f"uv sync, {'editable' if editable else 'not editable'}, {link_mode}": (editable, link_mode)
    for editable in (False, True)
    for link_mode in ("copy", "hardlink", "symlink")
}
WAYS = ("wheel from the sdist", "sdist", "--user", *WITH_UV)

OF_OPTIONS = (*continuation.PATCH_SETS, sampling.PATCH_SET)
LOOKED_AT = tuple(name for name in instrumentation.status() if name not in OF_OPTIONS)
"""The patch sets that a vLLM without their modules is warned of, in this order, once it has been looked at; those of
options that are off are skipped."""


@dataclass(frozen=True)
class Way:
    """A way to install into an environment that was made for it and held `before`, and to uninstall again."""

    environment: Environment
    install: Callable[[], None]
    uninstall: Callable[[], None]
    before: set[str]


def with_pip(environment: Environment, *what: str | Path) -> Way:
    # pip takes a folder away that it leaves empty, and there is none of these in a new user site.
    for folder in (environment.site_packages, environment.scripts):
        folder.mkdir(exist_ok=True)
        (folder / "neighbour").touch()
    return Way(
        environment,
        install=lambda: environment.pip("install", "--no-deps", *what),
        uninstall=lambda: environment.pip("uninstall", "-y", "agentlightning"),
        before=environment.paths(),
    )


def with_uv(folder: Path, uv: Callable[..., None], *, editable: bool, link_mode: str) -> Way:
    environment = Environment(folder / ".venv", folder / ".venv" / "bin" / "python")

    def sync(dependencies: Sequence[str]) -> None:
        source = f"agentlightning = {{ path = '{CHECKOUT}', editable = {str(editable).lower()} }}"
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "project"\nversion = "1"\n'
            f'requires-python = ">=3.10"\ndependencies = {dependencies}\n'
            f"[tool.uv.sources]\n{source if dependencies else ''}\n"
        )
        uv("sync", "--project", folder, "--link-mode", link_mode)

    uv("venv", "--python", sys.executable, environment.folder)
    sync([])
    return Way(
        environment,
        install=lambda: sync(["agentlightning"]),
        uninstall=lambda: sync([]),
        before=environment.paths(),
    )


def user_site(folder: Path) -> Environment:
    """A user's own site-packages, in `folder`, for the interpreter that the tests' environment was made from."""
    python = Path(sys.base_prefix, "bin", f"python{THIS_PYTHON}")
    # Where the system manages the interpreter, pip would refuse, also what goes to `folder` alone.
    environment = Environment(folder, python, {"PYTHONUSERBASE": str(folder), "PIP_BREAK_SYSTEM_PACKAGES": "1"})
    Path(environment.execute("import site; print(site.getusersitepackages())").strip()).mkdir(parents=True)
    return environment


def looked_at(output: str) -> tuple[str, ...]:
    """The patch sets that `output`, in which nothing else may be, says to be left off."""
    lines = (line.partition(" is not patched: vLLM ")[0] for line in output.splitlines())
    return tuple(line.removeprefix("agentlightning: ") for line in lines)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which lies beside it."""
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    folder = tmp_path_factory.mktemp("uv")
    run(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--target", folder, "uv")

    def uv(*arguments: str | Path) -> None:
        # The user's cache may hold an earlier state of the checkout, or lie where nothing can be hard-linked from.
        run(folder / "bin" / "uv", *arguments, UV_CACHE_DIR=str(folder / "cache"))

    return uv


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """Each way in turn, installed."""
    folder = tmp_path_factory.mktemp("way")
    if request.param in WITH_UV:
        editable, link_mode = WITH_UV[request.param]
        way = with_uv(folder, request.getfixturevalue("uv"), editable=editable, link_mode=link_mode)
    elif request.param == "--user":
        way = with_pip(user_site(folder), "--user", wheel)
    else:
        (sdist,) = wheel.parent.glob("*.tar.gz")
        way = with_pip(virtual_environment(folder), sdist if request.param == "sdist" else wheel)
    way.install()
    return way


@pytest.fixture(scope="module")
def of_user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A user's own site-packages that the wheel was installed into."""
    environment = user_site(tmp_path_factory.mktemp("of_user"))
    environment.pip("install", "--no-deps", "--user", wheel)
    return environment


@pytest.fixture(scope="module", params=VERSIONS)
def interpreter(request: pytest.FixtureRequest) -> Path:
    """Each Python that the package is for and that this machine has."""
    python = find_python(request.param)
    if python is None:
        pytest.skip(f"there is no Python {request.param} on this machine, or none that runs")
    return python


@pytest.fixture(scope="module")
def installed(interpreter: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of each Python, with the wheel and the script `finders`, another package's."""
    folder = tmp_path_factory.mktemp("installed")
    main = f"def main():\n    {OUR_FINDERS}\n"
    neighbour = made_up_wheel(folder, "neighbour", "1", {"neighbour.py": main}, "finders = neighbour:main")
    environment = virtual_environment(folder / "environment", interpreter)
    environment.pip("install", "--no-deps", wheel, neighbour)
    return environment


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel was unpacked into, by `pip install --target`."""
    folder = tmp_path_factory.mktemp("target")
    run(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps", "-t", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import a vLLM from that has none of the modules that are patched, and needs no other package."""
    folder = tmp_path_factory.mktemp("vllm")
    made_up_vllm(folder, "bare")
    return folder


def test_each_way_to_install_arms_where_the_variable_asks_for_it(way: Way) -> None:
    assert way.environment.execute(OUR_FINDERS, AGL_INSTRUMENT="1") == "1\n"


def test_each_way_to_install_imports_nothing_where_the_variable_is_not_set(way: Way) -> None:
    assert way.environment.execute(OUR_MODULES) == "\n"


def test_each_way_to_install_looks_at_vllm_when_it_is_imported(way: Way, vllm: Path) -> None:
    output = way.environment.execute("import vllm", AGL_INSTRUMENT="1", PYTHONPATH=str(vllm))

    assert looked_at(output) == LOOKED_AT


def test_each_way_to_install_brings_agl(way: Way) -> None:
    output = way.environment.run(way.environment.scripts / "agl", "--version", AGL_INSTRUMENT="1")

    assert output == f"agl {agentlightning.__version__}\n"


def test_each_way_to_install_can_be_undone_without_a_trace_and_done_again(way: Way) -> None:
    way.environment.execute("import agentlightning.instrumentation", AGL_INSTRUMENT="1")

    way.uninstall()
    after, modules = way.environment.paths(), way.environment.execute(OUR_MODULES, AGL_INSTRUMENT="1")
    # Before anything can fail: other tests find it installed.
    way.install()

    assert after == way.before
    assert modules == "\n"
    assert way.environment.execute(OUR_FINDERS, AGL_INSTRUMENT="1") == "1\n"


@pytest.mark.parametrize(
    ("options", "variables"),
    [(["-s"], {}), (["-I"], {}), ([], {"PYTHONNOUSERSITE": "1"})],
    ids=["-s", "-I", "PYTHONNOUSERSITE"],
)
def test_a_users_own_install_arms_nothing_that_leaves_the_user_out(
    options: Sequence[str], variables: Mapping[str, str], of_user: Environment
) -> None:
    output = of_user.run(of_user.python, *options, "-c", OUR_FINDERS, AGL_INSTRUMENT="1", **variables)

    assert output == "0\n"


@pytest.mark.parametrize(
    ("options", "finders"), [(["--system-site-packages"], 1), ([], 0)], ids=["sees it", "does not see it"]
)
def test_a_users_own_install_arms_the_venvs_that_see_it_alone(
    options: Sequence[str], finders: int, of_user: Environment, tmp_path: Path
) -> None:
    venv = virtual_environment(tmp_path, of_user.python, *options)

    assert venv.execute(OUR_FINDERS, AGL_INSTRUMENT="1", **of_user.variables) == f"{finders}\n"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_each_python_with_the_variable_off_imports_no_module_of_the_package(
    value: str | None, installed: Environment
) -> None:
    variables = {} if value is None else {"AGL_INSTRUMENT": value}

    assert installed.execute(OUR_MODULES, **variables) == "\n"


@pytest.mark.parametrize("option", ["-I", "-E", "-s", "-P", "-Xdev", "-Werror"])
def test_each_python_is_armed_once_and_says_nothing_with_each_option_that_leaves_site_on(
    option: str, installed: Environment
) -> None:
    if option == "-P" and installed.execute("import sys; print(hasattr(sys.flags, 'safe_path'))") == "False\n":
        pytest.skip("this Python has no -P, 3.11 is the first")

    assert installed.run(installed.python, option, "-c", OUR_FINDERS, AGL_INSTRUMENT="1") == "1\n"


@pytest.mark.parametrize("variable", ["PYTHONSAFEPATH", "PYTHONNOUSERSITE"])
def test_each_python_is_armed_once_with_each_variable_that_cuts_it_off(variable: str, installed: Environment) -> None:
    assert installed.execute(OUR_FINDERS, AGL_INSTRUMENT="1", **{variable: "1"}) == "1\n"


def test_each_python_is_armed_once(installed: Environment) -> None:
    assert installed.execute(OUR_FINDERS, AGL_INSTRUMENT="1") == "1\n"


def test_no_python_is_armed_without_site(installed: Environment) -> None:
    assert installed.run(installed.python, "-S", "-c", OUR_FINDERS, AGL_INSTRUMENT="1") == "0\n"


def test_each_python_runs_agl(installed: Environment) -> None:
    output = installed.run(installed.scripts / "agl", "--version", AGL_INSTRUMENT="1")

    assert output == f"agl {agentlightning.__version__}\n"


def test_each_python_is_armed_once_in_another_packages_script(installed: Environment) -> None:
    assert installed.run(installed.scripts / "finders", AGL_INSTRUMENT="1") == "1\n"


def test_each_python_looks_at_vllm_when_it_is_imported(installed: Environment, vllm: Path) -> None:
    output = installed.execute("import vllm", AGL_INSTRUMENT="1", PYTHONPATH=str(vllm))

    assert looked_at(output) == LOOKED_AT


PARENT = """\
import multiprocessing, sys

def finders():
    import vllm
    return sum(type(f).__module__ == '_agentlightning' for f in sys.meta_path)

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(finders), "vllm" in sys.modules)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_each_python_looks_at_a_vllm_that_a_child_imports(
    method: str, installed: Environment, vllm: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(PARENT)

    output = installed.run(installed.python, parent, method, AGL_INSTRUMENT="1", PYTHONPATH=str(vllm))

    *warnings, finders = output.splitlines(keepends=True)
    assert looked_at("".join(warnings)) == LOOKED_AT
    assert finders == "1 False\n"


def test_no_python_is_armed_by_a_folder_that_is_only_on_pythonpath(
    interpreter: Path, target: Path, tmp_path: Path
) -> None:
    venv = virtual_environment(tmp_path, interpreter)
    code = f"{OUR_FINDERS}; import agentlightning; print(agentlightning.__file__)"

    output = venv.execute(code, AGL_INSTRUMENT="1", PYTHONPATH=str(target))

    assert (target / "agentlightning.pth").exists()
    assert output.splitlines() == ["0", str(target / "agentlightning" / "__init__.py")]


def test_a_program_that_has_the_package_only_on_pythonpath_can_instrument_itself(
    interpreter: Path, target: Path, vllm: Path, tmp_path: Path
) -> None:
    venv = virtual_environment(tmp_path, interpreter)
    code = "from agentlightning.instrumentation import instrument_vllm; instrument_vllm(); import vllm"

    output = venv.execute(code, PYTHONPATH=os.pathsep.join(map(str, (target, vllm))))

    assert looked_at(output) == LOOKED_AT
