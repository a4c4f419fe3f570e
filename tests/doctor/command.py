"""`agl doctor` as a user runs it, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.common.environments import Environment
from tests.common.forking import run_agl

SECONDS = 300
NOT_INHERITED = ("AGL_", "PYTHON", "VLLM_", "NO_COLOR")


@dataclass(frozen=True)
class Said:
    """Output and exit status of the command."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """The whole stdout as one line, without its wrapping."""
        return " ".join(self.stdout.split())

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)


def variables(**changes: str) -> dict[str, str]:
    """This process's environment without what the command looks at, and with `changes`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return inherited | changes


def agl_doctor(environment: Environment) -> list[str | Path]:
    # By its interpreter: where the script was copied to, its first line names the one that it was made for.
    return [environment.python, environment.scripts / "agl", "doctor"]


def run(*command: str | Path, **changes: str) -> Said:
    result = subprocess.run(
        command,
        env=variables(**changes),
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Said(result.returncode, result.stdout, result.stderr)


def doctor_elsewhere(*arguments: str, **changes: str) -> Said:
    """Run what does not look at the environment that it runs in: `agl doctor --url` and `--store`."""
    ended = run_agl("doctor", *arguments, env=variables(**changes), folder=Path("/"), timeout=SECONDS)
    return Said(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def doctor(environment: Environment, *arguments: str, **changes: str) -> Said:
    return run(*agl_doctor(environment), *arguments, **changes)


def write_dist_info(folder: Path, name: str, version: str, files: Sequence[str]) -> Path:
    """Write metadata of a distribution that installed `files`, which are in `folder` already."""
    dist_info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    dist_info.mkdir(parents=True)
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (dist_info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return dist_info
