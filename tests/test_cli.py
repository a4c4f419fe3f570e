"""The command `agl`, as whoever types it sees it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import agentlightning
from agentlightning.importhook import locate
from tests.common.made_up_vllm import made_up_vllm
from tools.lock import constraints_of_tests

# Each way with each program in the largest tier; otherwise each way and each program once.
PAIRS = pytest.mark.parametrize(
    ("agl_vllm", "program"),
    [
        ("agl vllm", "vllm"),
        ("python -m", "main.py"),
        pytest.param("agl vllm", "main.py", marks=pytest.mark.tier("all")),
        pytest.param("python -m", "vllm", marks=pytest.mark.tier("all")),
    ],
    indirect=True,
)
CHECKOUT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
WAYS_TO_CALL = {"agl vllm": ("agl", "vllm"), "python -m": ("python", "-m", "agentlightning.cli.vllm")}
SECONDS = 120
SWITCHES_ELSEWHERE = ("", "off", "FALSE", "No", "1", "TRUE")
"""The other values of `AGL_INSTRUMENT`; how each is read is a test of the settings."""

VLLM_SCRIPT = """\
#!{python}
import sys
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
VLLM_MAIN = """\
import json, os, sys

def main():
    said = {
        "program": os.path.basename(sys.argv[0]),
        "arguments": sys.argv[1:],
        "process": os.getpid(),
        "AGL_INSTRUMENT": os.environ.get("AGL_INSTRUMENT"),
        "armed": "agentlightning.importhook" in sys.modules,
    }
    print(json.dumps(said), flush=True)
    if sys.argv[1:2] == ["exit"]:
        sys.exit(int(sys.argv[2]))
    if sys.argv[1:2] == ["read"]:
        print(sys.stdin.read(), end="")

if __name__ == "__main__":
    main()
"""


def variables(**changes: str) -> dict[str, str]:
    inherited = {n: value for n, value in os.environ.items() if not n.startswith(("AGL_", "PYTHONPATH", "PYTHONHOME"))}
    return inherited | changes


def run(*command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=variables(**changes),
        # Not the checkout, which `-m` would import from.
        cwd=sys.prefix,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def agl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(SCRIPTS / "agl", *arguments)


def what_vllm_says(*command: str | Path, **changes: str) -> dict[str, Any]:
    result = run(*command, **changes)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def the_one_line_of(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a command says that gives up: one line on stderr, nothing on stdout, exit status 1."""
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line


def write_package(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds this package and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    for command in (
        (sys.executable, "-m", "venv", "--without-pip", folder),
        (*pip, "install", "--disable-pip-version-check", "-q", "--no-deps", CHECKOUT),
    ):
        result = run(*command, **constraints_of_tests())
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(params=WAYS_TO_CALL)
def agl_vllm(request: pytest.FixtureRequest, environment: Path) -> list[str | Path]:
    """Each way to call `agl vllm`, in an environment without vLLM."""
    program, *arguments = WAYS_TO_CALL[request.param]
    return [environment / "bin" / program, *arguments]


@pytest.fixture(params=["vllm", "main.py"])
def program(request: pytest.FixtureRequest, environment: Path) -> Iterator[str]:
    """Puts a stand-in for vLLM into the environment, which only tells how it was started; the name it runs under.

    `vllm` is the script that pip writes; without it, the package runs as a module. A real vLLM answers neither what
    arguments it got nor which process it is.
    """
    script = environment / "bin" / "vllm"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    vllm = site_packages / "vllm"
    # With what is looked for when it is imported: strict would not let it start without.
    made_up_vllm(site_packages)
    (vllm / "entrypoints" / "cli" / "main.py").write_text(VLLM_MAIN)
    if request.param == script.name:
        script.write_text(VLLM_SCRIPT.format(python=environment / "bin" / "python"))
        script.chmod(0o755)
    yield request.param
    shutil.rmtree(vllm)
    script.unlink(missing_ok=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_agl_names_its_commands(arguments: tuple[str, ...]) -> None:
    result = agl(*arguments)

    assert (result.returncode, result.stderr) == (0, "")
    # The first word of each indented line.
    assert {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")} >= {
        "vllm",
        "doctor",
        "export",
        "store",
        "migrate",
        "prune",
        "agentops",
    }


def test_agl_tells_its_version() -> None:
    result = agl("--version")

    assert (result.returncode, result.stdout, result.stderr) == (0, f"agl {agentlightning.__version__}\n", "")


@pytest.mark.parametrize("command", ["vlm", "serve", ""])
def test_an_unknown_command_is_answered_with_the_known_ones(command: str) -> None:
    result = agl(command, "--port", "8000")

    assert (result.returncode, result.stdout) == (2, "")
    sentence, where_to_look = result.stderr.splitlines()
    assert repr(command) in sentence
    assert all(known in sentence for known in ("vllm", "store", "agentops"))
    assert where_to_look == "see agl --help"


@PAIRS
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--help",),
        ("--version",),
        ("--", "serve"),
        ("serve", "--", "--help", "--"),
        ("serve", "", " ", "a model", " padded\t"),
        ("it's", 'say "hi"', "$HOME", "`id`", "*", "\\", "%s", "a;b", "-", "-1"),
        ('--json={"a": [1, "b"]}', "two\nlines\n", "\r\n"),
        ("größe", "北京", "\N{GRINNING FACE}", "e\N{COMBINING ACUTE ACCENT}"),
        # A byte that is not UTF-8, as Python passes it on.
        ("/models/\udcff",),
    ],
)
def test_vllm_gets_the_arguments_untouched(
    agl_vllm: list[str | Path], program: str, arguments: tuple[str, ...]
) -> None:
    said = what_vllm_says(*agl_vllm, *arguments)

    assert (said["program"], said["arguments"]) == (program, list(arguments))


@PAIRS
@pytest.mark.parametrize(
    "value",
    [None, "0", "yes", *(pytest.param(value, marks=pytest.mark.tier("all")) for value in SWITCHES_ELSEWHERE)],
)
def test_agl_vllm_switches_the_instrumentation_on(agl_vllm: list[str | Path], program: str, value: str | None) -> None:
    said = what_vllm_says(*agl_vllm, **({} if value is None else {"AGL_INSTRUMENT": value}))

    assert (said["program"], said["AGL_INSTRUMENT"], said["armed"]) == (program, "1", True)


@PAIRS
@pytest.mark.parametrize("value", ["strict", "STRICT", pytest.param("Strict", marks=pytest.mark.tier("all"))])
def test_agl_vllm_keeps_strict(agl_vllm: list[str | Path], program: str, value: str) -> None:
    said = what_vllm_says(*agl_vllm, AGL_INSTRUMENT=value)

    assert (said["program"], said["AGL_INSTRUMENT"], said["armed"]) == (program, value, True)


@PAIRS
@pytest.mark.parametrize("status", [0, 255, *(pytest.param(each, marks=pytest.mark.tier("all")) for each in (1, 3))])
def test_the_exit_status_is_the_one_of_vllm(agl_vllm: list[str | Path], program: str, status: int) -> None:
    result = run(*agl_vllm, "exit", str(status))

    assert json.loads(result.stdout)["program"] == program
    assert result.returncode == status


@PAIRS
def test_vllm_is_the_process_that_was_started_and_a_signal_to_it_ends_it(
    agl_vllm: list[str | Path], program: str
) -> None:
    # Its input is not closed before the signal has done its work: only the signal can end it.
    with subprocess.Popen(
        [*agl_vllm, "read"],
        env=variables(),
        cwd=sys.prefix,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        status = process.wait(SECONDS)

    assert (said["program"], said["process"]) == (program, process.pid)
    assert status == -signal.SIGTERM


@PAIRS
def test_vllm_reads_the_input_that_agl_was_given(agl_vllm: list[str | Path], program: str) -> None:
    result = subprocess.run(
        [*agl_vllm, "read"],
        env=variables(),
        cwd=sys.prefix,
        input=f"to {program}\n",
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=True,
    )

    assert result.stdout.splitlines()[1:] == [f"to {program}"]


@PAIRS
@pytest.mark.usefixtures("program")
def test_vllm_runs_where_stdout_is_closed(agl_vllm: list[str | Path]) -> None:
    result = run("sh", "-c", 'exec "$@" >&-', "sh", *agl_vllm, "exit", "3")

    assert result.returncode == 3, result.stderr


def test_without_vllm_the_interpreter_and_the_install_command_are_named(
    agl_vllm: list[str | Path], environment: Path
) -> None:
    python = environment / "bin" / "python"

    line = the_one_line_of(run(*agl_vllm, "serve", "model"))

    assert line == f"agl vllm: vLLM is not installed for {python}; install it with: {python} -m pip install vllm"


@pytest.mark.parametrize("package", ["leftovers", "package", "cli"])
def test_half_a_vllm_is_called_incomplete(agl_vllm: list[str | Path], package: str, tmp_path: Path) -> None:
    vllm = tmp_path / "vllm"
    match package:
        case "leftovers":
            (vllm / "__pycache__").mkdir(parents=True)
        case "package":
            write_package(vllm)
        case "cli":
            for folder in (vllm, vllm / "entrypoints", vllm / "entrypoints" / "cli"):
                write_package(folder)

    line = the_one_line_of(run(*agl_vllm, "serve", "model", PYTHONPATH=str(tmp_path)))

    assert f"the vLLM at {vllm}" in line
    assert "incomplete" in line
    assert "install it again with: " in line


@pytest.mark.skipif(locate("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--version",), id="--version"),
        pytest.param(("serve", "--help"), id="serve --help", marks=pytest.mark.tier("all")),
    ],
)
def test_the_real_vllm_answers_agl_as_it_answers_without(arguments: tuple[str, ...]) -> None:
    def answer(*command: str | Path) -> subprocess.CompletedProcess[str]:
        # Older releases log to stdout, with times.
        return run(*command, *arguments, VLLM_LOGGING_LEVEL="ERROR")

    with ThreadPoolExecutor() as both:
        plain, ours = both.map(lambda command: answer(*command), [(SCRIPTS / "vllm",), (SCRIPTS / "agl", "vllm")])

    assert plain.returncode == 0, plain.stderr
    assert plain.stdout
    assert (ours.returncode, ours.stdout) == (0, plain.stdout)
