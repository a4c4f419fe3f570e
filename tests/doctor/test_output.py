"""The form of what `agl doctor` says: on a terminal, in a pipe, for programs."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from agentlightning import __version__
from tests.common.environments import Environment
from tests.doctor.command import SECONDS, agl_doctor, doctor, variables

IMPORTING = "importing vLLM as a server would (ten to sixty seconds) ..."


def on_a_terminal(environment: Environment, *arguments: str, which: str = "stdout", **changes: str) -> str:
    """Run the command with a terminal as its stdout or stderr; return what it shows."""
    ours, its = pty.openpty()
    with subprocess.Popen(
        [*agl_doctor(environment), *arguments],
        env=variables(**{"TERM": "xterm", **changes}),
        cwd="/",
        stdout=its if which == "stdout" else subprocess.DEVNULL,
        stderr=its if which == "stderr" else subprocess.DEVNULL,
    ) as process:
        os.close(its)
        shown = b""
        # Linux ends it with an error, others with nothing.
        try:
            while read := os.read(ours, 65536):
                shown += read
        except OSError:
            pass
        process.wait(SECONDS)
    os.close(ours)
    return shown.decode()


def spoil(environment: Environment) -> None:
    """An ok, a note and a problem, without vLLM: quick."""
    shutil.rmtree(environment.site_packages / "vllm")


@pytest.mark.parametrize("spoilt", [False, True])
def test_report_fits_80_columns_but_for_words_that_cannot_be_broken(environment: Environment, spoilt: bool) -> None:
    if spoilt:
        spoil(environment)

    lines = doctor(environment, VLLM_PLUGINS="", AGL_INSTRUMENT="maybe").stdout.splitlines()

    column = next(line for line in lines if line.startswith("ok")).index(f"agentlightning {__version__}")
    assert [line for line in lines if len(line) > 80 and " " in line[column:]] == []
    assert [line for line in lines if line != line.rstrip()] == []


def test_colours_are_for_terminals_alone(environment: Environment) -> None:
    spoil(environment)

    shown = on_a_terminal(environment)
    piped = doctor(environment, TERM="xterm")

    for colour, mark in (("32", "ok"), ("33", "note"), ("31;1", "problem")):
        assert f"\033[{colour}m{mark:<7}\033[0m" in shown
    assert "\033" not in piped.stdout + piped.stderr
    assert "\033" not in on_a_terminal(environment, NO_COLOR="1")
    assert "\033" not in on_a_terminal(environment, TERM="dumb")


def test_findings_without_vllm_are_shown_before_vllm_is_imported(environment: Environment, tmp_path: Path) -> None:
    vllm = environment.site_packages / "vllm" / "__init__.py"
    opened = tmp_path / "opened"
    os.mkfifo(opened)
    # Opening it waits for the other side.
    vllm.write_text(f"open({str(opened)!r}).close()\n{vllm.read_text()}")

    with subprocess.Popen(
        agl_doctor(environment), env=variables(AGL_STORE=str(tmp_path / "run.db")), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = " ".join(" ".join(iter(process.stdout.readline, f"{IMPORTING}\n")).split())
        opened.open("w").close()
        rest = " ".join(process.stdout.read().split())

    assert process.returncode == 0, rest
    for finding in ("package", "agentlightning.pth", "vLLM", "AGL_STORE"):
        assert f"ok {finding} " in first
    assert "ok chat applied" in rest
    assert "applied" not in first


@pytest.mark.parametrize("arguments", [("--quick",), ("--quick", "--json")])
def test_doctor_with_quick_imports_no_vllm(
    environment: Environment, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    vllm = environment.site_packages / "vllm" / "__init__.py"
    imported = tmp_path / "imported"
    vllm.write_text(f"open({str(imported)!r}, 'w')\n{vllm.read_text()}")

    said = doctor(environment, *arguments)

    assert said.status == 0, said.stdout
    assert not imported.exists()
    assert "not tried: that needs an import of vLLM, which --quick leaves out" in said.text
    assert IMPORTING not in said.stdout + said.stderr


def test_doctor_with_json_prints_one_object(environment: Environment) -> None:
    said = doctor(environment, "--json")

    assert said.status == 0, said.stdout
    assert said.json.keys() == {"ok", "findings"}
    assert said.json["ok"] is True
    for finding in said.json["findings"]:
        assert finding.keys() == {"subject", "mark", "text", "advice"}
        assert finding["mark"] in ("ok", "note")


def test_json_names_the_problem_and_what_to_do(environment: Environment) -> None:
    spoil(environment)

    said = doctor(environment, "--json")

    assert said.status == 1
    assert said.json["ok"] is False
    (problem,) = (finding for finding in said.json["findings"] if finding["mark"] == "problem")
    assert problem["subject"] == "vLLM"
    assert problem["advice"] == f"install it with: {environment.python} -m pip install vllm"


def test_stdout_has_the_report_alone(environment: Environment) -> None:
    vllm = environment.site_packages / "vllm" / "__init__.py"
    vllm.write_text(f"print('hello')\nimport os; os.write(1, b'hello')\n{vllm.read_text()}")

    said = doctor(environment, "--json")

    assert said.json["ok"] is True
    assert "hello" not in said.stdout + said.stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_explains_the_options_and_the_exit_status(environment: Environment, option: str) -> None:
    said = doctor(environment, option, VLLM_API_KEY="secret-%s")

    assert (said.status, said.stderr) == (0, "")
    assert said.text.startswith("usage: agl doctor ")
    assert all(option in said.text for option in ("--quick", "--url", "--api-key", "--json", "VLLM_API_KEY"))
    assert "The exit status is 0 when all is well, 1 when there is a problem." in said.text
    assert "secret" not in said.text


def test_version_is_printed(environment: Environment) -> None:
    assert doctor(environment, "--version").stdout == f"agl {__version__}\n"


@pytest.mark.parametrize("arguments", [("--colour",), ("http://localhost:8000",), ("--url",)])
def test_unknown_arguments_exit_with_status_2(environment: Environment, arguments: tuple[str, ...]) -> None:
    said = doctor(environment, *arguments)

    assert (said.status, said.stdout) == (2, "")
    assert said.stderr.startswith("agl doctor: ")
    assert said.stderr.endswith("\nsee agl doctor --help\n")
    assert arguments[0] in said.stderr
