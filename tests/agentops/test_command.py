"""`agl agentops`: the variables that it prints, its daemon, and its errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.common.environments import CHECKOUT
from tests.common.vllm import free_port, without_agl

AGL = (sys.executable, "-m", "agentlightning", "agentops")
SECONDS = 60


class Command:
    """Run the command in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid_file = folder / "agl-agentops.pid"

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AGL, *arguments],
            cwd=self.folder,
            env={**without_agl(os.environ), "PYTHONPATH": str(CHECKOUT), **variables},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def pid(self) -> int:
        return int(self.pid_file.read_text())


@pytest.fixture
def agentops(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    command("--stop")


def exported(output: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)=(.*)$", output, re.MULTILINE))


def test_daemon_answers_when_the_command_returns(agentops: Command) -> None:
    result = agentops("--daemon", "--port=0")
    variables = exported(result.stdout)
    url = variables["AGENTOPS_API_ENDPOINT"]

    assert (result.returncode, result.stderr) == (0, "")
    assert variables == {
        "AGENTOPS_API_KEY": "agl",
        "AGENTOPS_API_ENDPOINT": url,
        "AGENTOPS_EXPORTER_ENDPOINT": f"{url}/v1/traces",
        "AGENTOPS_APP_URL": url,
    }
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert httpx.post(f"{url}/v3/auth/token", json={"api_key": "agl"}).status_code == 200


def test_foreground_prints_variables_and_ends_on_sigterm(tmp_path: Path) -> None:
    env = {**without_agl(os.environ), "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen([*AGL, "--port=0"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        variables = exported("".join(process.stdout.readline() for _ in range(4)))
        assert httpx.get(f"{variables['AGENTOPS_API_ENDPOINT']}/readyz").status_code == 200
        process.terminate()
        assert process.wait(SECONDS) == -signal.SIGTERM


def test_help_names_default_host_and_port(agentops: Command) -> None:
    shown = agentops("--help").stdout

    assert re.search(r"--host HOST.*\(default:\s+127\.0\.0\.1\)", shown, re.DOTALL)
    assert re.search(r"--port PORT.*\(default: 8002\)", shown, re.DOTALL)


def test_stop_ends_the_daemon(agentops: Command) -> None:
    agentops("--daemon", "--port=0")
    pid = agentops.pid()
    result = agentops("--stop")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not agentops.pid_file.exists()


def test_second_daemon_with_the_same_pid_file_is_refused(agentops: Command) -> None:
    agentops("--daemon", "--port=0")
    pid = agentops.pid()
    again = agentops("--daemon", "--port=0")

    assert (again.returncode, again.stdout) == (1, "")
    assert "--stop" in again.stderr
    assert agentops.pid() == pid
    assert psutil.pid_exists(pid)


def test_stop_without_a_daemon_says_so(agentops: Command) -> None:
    result = agentops("--stop")

    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "not running" in result.stderr


def test_stale_pid_file_is_ignored(agentops: Command) -> None:
    agentops("--daemon", "--port=0")
    pid = agentops.pid()
    os.kill(pid, signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        pass
    # As if another process had got its process id.
    agentops.pid_file.write_text(f"{os.getpid()}\n")
    result = agentops("--stop")

    assert result.returncode == 1
    assert "not running any more" in result.stderr
    assert agentops("--daemon", "--port=0").returncode == 0


def test_daemon_that_cannot_start_says_why(agentops: Command) -> None:
    result = agentops("--daemon", "--port=0", "--store=nowhere/store.db")

    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"agl agentops: .*nowhere/store\.db cannot be opened: .*\n", result.stderr)
    assert not agentops.pid_file.exists()


def test_port_in_use_is_reported(agentops: Command) -> None:
    url = exported(agentops("--daemon", f"--port={free_port()}").stdout)["AGENTOPS_API_ENDPOINT"]
    port = url.rpartition(":")[2]
    result = agentops("--daemon", f"--port={port}", "--pid-file=other.pid")

    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--daemon",)])
def test_public_host_without_a_key_is_refused(agentops: Command, arguments: tuple[str, ...]) -> None:
    result = agentops("--host=0.0.0.0", "--port=0", *arguments)

    assert result.returncode == 2
    assert "--api-key" in result.stderr


def test_key_is_never_printed(agentops: Command) -> None:
    key = "a-secret-key"
    result = agentops("--daemon", "--port=0", AGL_STORE_KEY=key)
    variables = exported(result.stdout)

    assert variables["AGENTOPS_API_KEY"] == '"${AGL_STORE_KEY:?is the key of the store}"'
    output = result.stdout + result.stderr + agentops.pid_file.with_suffix(".log").read_text()
    assert key not in output
    answers = [
        httpx.post(f"{variables['AGENTOPS_API_ENDPOINT']}/v3/auth/token", json={"api_key": each})
        for each in (key, "another")
    ]
    assert [answer.status_code for answer in answers] == [200, 401]


def test_missing_package_says_what_to_install(agentops: Command) -> None:
    missing = agentops.folder / "missing"
    missing.mkdir()
    (missing / "jwt.py").write_text("raise ImportError('no', name='jwt')\n")
    result = agentops("--port=0", PYTHONPATH=f"{missing}{os.pathsep}{CHECKOUT}")

    assert result.returncode == 1
    assert "(jwt)" in result.stderr
    assert "pip install" in result.stderr
    assert result.stderr.rstrip().endswith("pyjwt")


@pytest.mark.parametrize("arguments", [("--stop",), ("--daemon", "--port=0")], ids=" ".join)
def test_pid_file_option_naming_another_file_leaves_it_unchanged(agentops: Command, arguments: tuple[str, ...]) -> None:
    thesis = agentops.folder / "thesis.txt"
    thesis.write_text("a long text\n")

    result = agentops(*arguments, f"--pid-file={thesis}")

    assert result.returncode == 1
    assert f"{thesis} is not a pid file" in result.stderr
    assert thesis.read_text() == "a long text\n"


def test_symbolic_link_as_pid_file_is_refused(agentops: Command) -> None:
    target = agentops.folder / "target"
    target.write_text("")
    agentops.pid_file.symlink_to(target)

    for arguments in (("--daemon", "--port=0"), ("--stop",)):
        assert agentops(*arguments).returncode == 1
    assert target.read_text() == ""


def test_log_as_pid_file_is_refused(agentops: Command) -> None:
    result = agentops("--daemon", "--port=0", "--pid-file=agl.log")

    assert result.returncode == 1
    assert "agl.log is not a pid file" in result.stderr
