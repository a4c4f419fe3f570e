"""A real PostgreSQL, as Debian packages it: a process of the tests' own, on a free port and in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.common.debian import POSTGRESQL

USER = "agl"
SECONDS = 120
MISSING = POSTGRESQL.missing


def programs() -> Path | None:
    """The folder of the newest PostgreSQL that is installed; None where there is none."""
    found = POSTGRESQL.find()
    return found.parent if found else None


class PostgresServer:
    """Started on entering the context, gone with all that it kept on leaving it; may be killed and started again."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # It refuses to run as root.
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = _account()
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._numbers = count()

    def __enter__(self) -> PostgresServer:
        self.folder = Path(tempfile.mkdtemp(prefix="agl-postgresql-"))
        if self._user:
            os.chown(self.folder, self._user["user"], self._user["group"])
        self._log = (self.folder / "log").open("ab")
        self._run(
            "initdb",
            f"--pgdata={self.folder}/data",
            f"--username={USER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, and wait until it lets clients in."""
        # Processes are killed here, not machines: what was written outlives them, and need not be on a disk. Killed, it
        # would else bring each of a thousand files there before it starts again.
        # With hundreds of databases, autovacuum would start several processes a second, beside the tests.
        settings = (
            f"-p{self.port}",
            f"-k{self.folder}",
            "-clisten_addresses=127.0.0.1",
            "-cfsync=off",
            "-cautovacuum=off",
        )
        command = [self._programs / "postgres", f"-D{self.folder}/data", *settings]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=self._log, stderr=self._log, start_new_session=True, **self._user
        )
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                said = (self.folder / "log").read_text()
                assert self.process.poll() is None, said
                assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as its service does: clients are sent away, and what they have committed is on disk."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(SECONDS)

    def kill(self) -> None:
        """SIGKILL, for each of its processes."""
        try:
            postmaster = psutil.Process(self.process.pid)
            # Stopped, it starts no process that this list would lack, and that would write on into its folder.
            postmaster.suspend()
            processes = [postmaster, *postmaster.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(processes[1:], SECONDS)

    def url(self, database: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, *arguments]
        subprocess.run(command, cwd=self.folder, stdout=self._log, stderr=self._log, check=True, **self._user)


def _account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LookupError("there is neither a user postgres nor a user nobody")
