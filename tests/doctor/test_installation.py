"""`agl doctor` on the package itself: each way to have it, and each way to have spoiled it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from agentlightning import __version__
from tests.common import environments
from tests.common.environments import Environment
from tests.doctor.command import agl_doctor, doctor, run, write_dist_info
from tests.doctor.conftest import write_vllm

PTH = "agentlightning.pth"
CLOSED: Mapping[str, str] = {"VLLM_PLUGINS": ""}
"""Makes vLLM load no plugin."""


def pth_of(environment: Environment) -> Path:
    return environment.site_packages / PTH


def remove_the_package(environment: Environment) -> None:
    environment.pip("uninstall", "-y", "agentlightning")


@pytest.fixture(scope="session")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel was unpacked into, by `pip install --target`."""
    folder = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps")
    environments.run(*pip, "-t", folder, wheel)
    return folder


def test_a_usual_installation_is_well(environment: Environment) -> None:
    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert f"ok package agentlightning {__version__}, in {environment.site_packages / 'agentlightning'}" in said.text
    assert f"ok {PTH} it arms every Python of this environment" in said.text
    assert said.text.endswith("All is well.")


def test_no_pth_but_the_plugin_is_a_note(environment: Environment) -> None:
    pth_of(environment).unlink()

    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert f"note {PTH} there is no {PTH} in {environment.site_packages}; vLLM itself calls us" in said.text
    assert "ok chat applied" in said.text


@pytest.mark.parametrize("plugins", ["", "other", "agentlightning2,other"])
def test_no_pth_and_no_plugin_is_a_problem(environment: Environment, plugins: str) -> None:
    pth_of(environment).unlink()

    said = doctor(environment, VLLM_PLUGINS=plugins)

    assert said.status == 1
    assert f"problem {PTH} there is no {PTH} in {environment.site_packages}" in said.text
    assert f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading agentlightning" in said.text
    assert "-> unset VLLM_PLUGINS, or add agentlightning to it" in said.text
    assert "All is well" not in said.text


@pytest.mark.parametrize("plugins", ["", "other"])
def test_a_shut_second_way_in_is_a_note(environment: Environment, plugins: str) -> None:
    said = doctor(environment, VLLM_PLUGINS=plugins)

    assert said.status == 0, said.stdout
    assert (
        f"note plugin vLLM cannot load us as its plugin, which is not needed here: VLLM_PLUGINS={plugins!r}"
        in said.text
    )


@pytest.mark.parametrize("plugins", ["agentlightning", "other,agentlightning"])
def test_a_second_way_in_that_is_open_is_not_mentioned(environment: Environment, plugins: str) -> None:
    said = doctor(environment, VLLM_PLUGINS=plugins)

    assert said.status == 0, said.stdout
    assert "plugin" not in said.text.lower()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import os; os.no_such_thing", "fails: AttributeError: module 'os' has no attribute 'no_such_thing'"),
        # As of the first and the next one, these are Python's words, which seldom change.
        ("import a_module_that_is_missing", "fails: ModuleNotFoundError: No module named 'a_module_that_is_missing'"),
        ("import os; (", "fails: SyntaxError: '(' was never closed"),
        ("", "arms nothing"),
    ],
)
def test_a_broken_pth_is_named_with_its_error(environment: Environment, line: str, reason: str) -> None:
    pth_of(environment).write_text(f"{line}\n")

    with_the_plugin, without = doctor(environment), doctor(environment, **CLOSED)

    assert with_the_plugin.status == 0, with_the_plugin.stdout
    assert f"note {PTH} {pth_of(environment)} {reason}; vLLM itself calls us" in with_the_plugin.text
    assert without.status == 1
    assert f"problem {PTH} {pth_of(environment)} {reason}, and " in without.text
    assert "pip uninstall agentlightning`" in without.text


def test_output_of_other_pth_files_is_no_finding(environment: Environment) -> None:
    (environment.site_packages / "others.pth").write_text("import a_module_that_is_missing\n")
    (environment.site_packages / "sitecustomize.py").write_text(
        "import sys; print('hello'); print('hello', file=sys.stderr)\n"
    )

    assert f"ok {PTH} it arms" in doctor(environment).text

    pth_of(environment).write_text("import os; os.no_such_thing\n")

    assert f"{pth_of(environment)} fails: AttributeError: module 'os'" in doctor(environment).text

    pth_of(environment).unlink()

    assert f"there is no {PTH} in {environment.site_packages}; vLLM" in doctor(environment).text


def test_a_pth_that_belongs_to_nothing_is_a_problem(environment: Environment, tmp_path: Path) -> None:
    # As on a machine whose virtual environments see what else is installed: there they see the user's packages too.
    cfg = environment.folder / "pyvenv.cfg"
    cfg.write_text(cfg.read_text().replace("site-packages = false", "site-packages = true"))
    code = "import site; print(site.getusersitepackages())"
    user_site = Path(environment.execute(code, PYTHONUSERBASE=str(tmp_path / "user")).strip())
    user_site.mkdir(parents=True)
    leftover = user_site / PTH
    shutil.copy(pth_of(environment), leftover)

    said = doctor(environment, PYTHONUSERBASE=str(tmp_path / "user"))

    assert said.status == 1
    assert f"problem leftover {leftover} belongs to no installed package -> delete {leftover}" in said.text

    leftover.unlink()

    assert doctor(environment, PYTHONUSERBASE=str(tmp_path / "user")).status == 0


@pytest.mark.parametrize("way", ["linked", "linked environment"])
def test_what_was_installed_as_links_is_as_good(environment: Environment, tmp_path: Path, way: str) -> None:
    if way == "linked":
        for installed in (pth_of(environment), environment.site_packages / "agentlightning" / "__init__.py"):
            installed.rename(tmp_path / installed.name)
            installed.symlink_to(tmp_path / installed.name)
    else:
        folder = tmp_path / "link"
        folder.symlink_to(environment.folder)
        environment = Environment(folder, folder / "bin" / "python")

    said = doctor(environment)

    assert said.status == 0, said.stdout


def test_a_folder_that_is_only_on_the_path_is_not_installed(environment: Environment, tmp_path: Path) -> None:
    shutil.copytree(environment.site_packages / "agentlightning", tmp_path / "path" / "agentlightning")
    shutil.copy(environment.site_packages / "_agentlightning.py", tmp_path / "path")
    remove_the_package(environment)

    said = run(environment.python, "-m", "agentlightning", "doctor", PYTHONPATH=str(tmp_path / "path"))

    assert said.status == 1
    assert (
        f"problem package {tmp_path / 'path' / 'agentlightning'} is only on Python's path, not installed" in said.text
    )
    assert f"-> install it: {environment.python} -m pip install" in said.text
    assert f"problem {PTH} there is no {PTH}" in said.text
    assert "ok chat" not in said.text


def test_a_target_folder_on_the_path_is_enough_where_vllm_calls_plugins(environment: Environment, target: Path) -> None:
    remove_the_package(environment)
    command = (environment.python, "-m", "agentlightning", "doctor")

    said, closed = run(*command, PYTHONPATH=str(target)), run(*command, PYTHONPATH=str(target), **CLOSED)

    assert said.status == 0, said.stdout
    assert f"ok package agentlightning {__version__}, in {target / 'agentlightning'}" in said.text
    assert f"note {PTH} there is no {PTH} in {environment.site_packages}; vLLM itself calls us" in said.text
    assert "ok chat applied" in said.text
    assert closed.status == 1


def test_without_site_the_plugin_is_what_counts(environment: Environment) -> None:
    command = (environment.python, "-S", "-m", "agentlightning", "doctor")
    path = str(environment.site_packages)

    said, closed = run(*command, PYTHONPATH=path), run(*command, PYTHONPATH=path, **CLOSED)

    assert said.status == 0, said.stdout
    assert f"note {PTH} Python runs no {PTH} under -S; vLLM itself calls us" in said.text
    assert "ok chat applied" in said.text
    assert closed.status == 1
    assert f"problem {PTH} Python runs no {PTH} under -S, and VLLM_PLUGINS='' keeps vLLM from" in closed.text
    assert "run Python without -S" in closed.text
    assert "ok chat applied" not in closed.text


def test_installed_twice_is_a_problem(environment: Environment, target: Path) -> None:
    said = doctor(environment, PYTHONPATH=str(target))

    assert said.status == 1
    assert "problem package agentlightning is installed more than once: " in said.text
    for folder in (environment.site_packages, target):
        assert f"agentlightning {__version__} in {folder}" in said.text
    assert f"-> run `{environment.python} -m pip uninstall agentlightning` until it finds nothing more" in said.text


def test_a_folder_that_is_on_the_path_twice_is_installed_once(environment: Environment) -> None:
    said = doctor(environment, PYTHONPATH=os.pathsep.join([str(environment.site_packages)] * 2))

    assert said.status == 0, said.stdout


@pytest.mark.parametrize(
    ("where", "version"), [("beside ours", "0.0.1"), ("beside ours", "99"), ("elsewhere", "0.3.0")]
)
def test_the_other_package_of_this_name_is_a_problem(
    environment: Environment, tmp_path: Path, where: str, version: str
) -> None:
    folder = environment.site_packages if where == "beside ours" else tmp_path / "elsewhere"
    write_dist_info(folder, "agentlightning", version, ["agentlightning/__init__.py", "agentlightning/trainer.py"])

    said = doctor(environment, **({} if where == "beside ours" else {"PYTHONPATH": str(folder)}))

    assert said.status == 1
    assert "problem package another project's package of the same name is installed too: " in said.text
    assert f"agentlightning {version} in {folder}" in said.text
    assert "-> run `" in said.text


@pytest.mark.parametrize(
    ("strangers", "named"),
    [
        (["theirs.py"], "theirs.py"),
        (["a/b.py", "c.py", "d.py", "e.py", "f.py"], "a/b.py, c.py, d.py and 2 more"),
    ],
)
def test_package_folder_with_files_of_another_package_is_a_problem(
    environment: Environment, strangers: list[str], named: str
) -> None:
    ours = environment.site_packages / "agentlightning"
    for stranger in strangers:
        (ours / stranger).parent.mkdir(exist_ok=True)
        (ours / stranger).touch()

    said = doctor(environment)

    assert said.status == 1
    assert f"problem files files of another package lie in {ours}: {named} -> delete {ours}, and run `" in said.text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 Python has no -P")
def test_a_clone_of_vllm_in_the_working_directory_is_not_looked_at(environment: Environment, tmp_path: Path) -> None:
    write_vllm(tmp_path / "clone", {"__version__ = ": "import a_compiled_module_that_is_missing\n__version__ = "})

    said = run("sh", "-c", 'cd "$0" && exec "$@"', tmp_path / "clone", *agl_doctor(environment))

    assert said.status == 0, said.stdout
    assert f"in {environment.site_packages / 'vllm'}" in said.text


ON_A_PYTHON_TO_COME = """\
import collections, sys
from agentlightning.cli import main
sys.version_info = collections.namedtuple("V", "major minor micro releaselevel serial")(3, {minor}, 0, "final", 0)
sys.exit(main(["doctor"]))
"""


def on_python_3(minor: int, environment: Environment) -> tuple[int, str]:
    said = run(environment.python, "-c", ON_A_PYTHON_TO_COME.format(minor=minor))
    assert said.stdout, said.stderr
    return said.status, said.text


def test_a_python_that_ignores_the_pth_needs_a_start_file(environment: Environment) -> None:
    # Where that Python has its packages.
    (environment.folder / "lib" / "python3.18").symlink_to(environment.site_packages.parent)
    start = environment.folder / "lib" / "python3.18" / "site-packages" / "agentlightning.start"

    status, text = on_python_3(18, environment)

    assert status == 1
    assert f"problem agentlightning.start Python 3.18 ignores the line in {PTH}" in text
    assert f"-> write one: echo agentlightning._startup:start > {start}" in text

    start.write_text("agentlightning._startup:start\n")

    assert on_python_3(18, environment)[0] == 0


def test_a_python_that_runs_the_pth_needs_no_start_file(environment: Environment) -> None:
    status, text = on_python_3(17, environment)

    assert status == 0, text
    assert "agentlightning.start" not in text
