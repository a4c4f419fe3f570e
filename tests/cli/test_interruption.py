"""Ctrl-C and SIGTERM: one line, and the end by that signal, whatever a command is doing."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agentlightning.generation import Generation
from agentlightning.importhook import locate
from agentlightning.store import open_store
from tests.common.terminal import CTRL_C, Terminal
from tests.common.vllm import SCRIPTS, without_agl

AGL = str(SCRIPTS / "agl")
SECONDS = 120

SIGNAL_AT_IMPORT = """\
import os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            {first}
            os.kill(os.{process}(), {number})
            {then}
sys.meta_path.insert(0, Finder())
"""
"""A `sitecustomize` that sends a signal when a module is about to be imported."""

COMMANDS = {
    "vllm": ("--version",),
    "doctor": ("--store", "store.db"),
    "export": ("--store", "store.db", "--format", "parquet", "-o", "out"),
    "store": ("--port=0", "--store=new.db"),
    "agentops": ("--port=0", "--store=new.db"),
}
MODULES = [
    *((command, "argparse") for command in COMMANDS if command != "vllm"),
    ("vllm", "agentlightning.cli.vllm"),
    ("vllm", "agentlightning.doctor.vllm"),
    ("doctor", "agentlightning.doctor.patches"),
    ("doctor", "sqlalchemy"),
    ("export", "tqdm"),
    ("export", "sqlalchemy.engine"),
    # A compiled module, whose import would turn an exception into an ImportError.
    ("export", "pyarrow.lib"),
    ("store", "uvicorn"),
    ("store", "pydantic_core"),
    ("store", "agentlightning.store.sqlite"),
    ("agentops", "jwt"),
    # While the event loop starts.
    ("agentops", "uvicorn.lifespan.on"),
]


def variables(
    folder: Path, module: str, number: int, process: str = "getpid", first: str = "pass", then: str = "pass"
) -> dict[str, str]:
    customize = SIGNAL_AT_IMPORT.format(module=module, number=number, process=process, first=first, then=then)
    (folder / "customize").mkdir()
    (folder / "customize" / "sitecustomize.py").write_text(customize)
    return {**without_agl(os.environ), "PYTHONPATH": str(folder / "customize")}


def run(*command: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize(("command", "module"), MODULES, ids=map(" ".join, MODULES))
def test_ctrl_c_during_an_import_prints_one_line(command: str, module: str, tmp_path: Path) -> None:
    with open_store(str(tmp_path / "store.db")) as store:
        store.add([Generation(request_id="1", finished_at=1, status="error")])
    env = variables(tmp_path, module, signal.SIGINT)

    result = run(AGL, command, *COMMANDS[command], folder=tmp_path, env=env)

    lines = [f"agl {command}: {word}\n" for word in ("interrupted", "stopped")]
    # From the moment at which a server's event loop starts, its end is what was meant.
    expected = lines[1] if module == "uvicorn.lifespan.on" else lines[0]
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "store"])
def test_sigterm_during_an_import_prints_one_line(command: str, tmp_path: Path) -> None:
    env = variables(tmp_path, "argparse", signal.SIGTERM)

    result = run(AGL, command, *COMMANDS[command], folder=tmp_path, env=env)

    assert (result.returncode, result.stderr) == (-signal.SIGTERM, f"agl {command}: interrupted\n")


def test_ctrl_c_is_130_in_a_shell(tmp_path: Path) -> None:
    env = variables(tmp_path, "argparse", signal.SIGINT)

    result = run("bash", "-c", f"{AGL} export; echo $?", folder=tmp_path, env=env)

    assert (result.stdout, result.stderr) == ("130\n", "agl export: interrupted\n")


def test_signal_that_a_shell_has_it_ignore_is_ignored(tmp_path: Path) -> None:
    env = variables(tmp_path, "argparse", signal.SIGINT)

    result = run("bash", "-c", f"trap '' INT; {AGL} export --version", folder=tmp_path, env=env)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["store", "agentops"])
def test_ctrl_c_on_a_server_prints_that_it_has_stopped(command: str, tmp_path: Path) -> None:
    line = shlex.join((AGL, command, "--port=0", f"--store={tmp_path / 'store.db'}"))
    # The shell is in the foreground as well, and does not end by it.
    terminal = Terminal(("bash", "-c", f"trap : INT; {line}; echo status $?"))
    terminal.read_until("is served at")
    terminal.press(CTRL_C)
    terminal.read_until("status ")
    assert terminal.wait() == 0

    # "^C" stands wherever the terminal was in what the server prints when it starts.
    assert terminal.shown.endswith(f"\nagl {command}: stopped\nstatus 130\n")
    assert "Traceback" not in terminal.shown


@pytest.mark.skipif(locate("vllm") is None, reason="vLLM is not installed")
def test_ctrl_c_while_doctor_imports_vllm_prints_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    env = {**without_agl(os.environ), "TMPDIR": str(tmp_path)}
    terminal = Terminal((AGL, "doctor"), env=env)
    terminal.read_until("importing vLLM")
    children = until_there_are_children(terminal.pid)
    terminal.press(CTRL_C)

    assert terminal.wait() == -signal.SIGINT
    assert terminal.shown.partition("^C")[2] == "\nagl doctor: interrupted\n"
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert [*tmp_path.glob("agl-doctor-*")] == []


def until_there_are_children(pid: int) -> list[psutil.Process]:
    while not (found := psutil.Process(pid).children()):
        pass
    return found


def test_ctrl_c_while_a_daemon_starts_ends_the_daemon(tmp_path: Path) -> None:
    # The daemon itself sends the signal to the process that waits for it, and would then wait forever.
    first = "open('daemon', 'w').write(str(os.getpid()))"
    env = variables(tmp_path, "uvicorn", signal.SIGINT, "getppid", first, "__import__('time').sleep(3600)")

    result = run(AGL, "agentops", "--daemon", "--port=0", folder=tmp_path, env=env)

    assert (result.returncode, result.stdout) == (-signal.SIGINT, "")
    assert result.stderr == "agl agentops: interrupted\n"
    assert not (tmp_path / "agl-agentops.pid").exists()
    psutil.wait_procs([psutil.Process(int(pid)) for pid in daemons(tmp_path)], SECONDS)
    assert (tmp_path / "agl-agentops.log").read_text() == "agl agentops: interrupted\n"


def daemons(folder: Path) -> list[str]:
    """Return the process id of the daemon, if it still runs."""
    pid = (folder / "daemon").read_text()
    return [pid] if psutil.pid_exists(int(pid)) else []


def test_ctrl_c_of_a_program_that_calls_no_command_stays_pythons() -> None:
    program = "import agentlightning.cli, signal; print(signal.getsignal(2) is signal.default_int_handler)"

    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "True\n"
    )
