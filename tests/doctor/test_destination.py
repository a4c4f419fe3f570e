"""`agl doctor` on the store of `AGL_STORE`: what a server that records there would find."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from agentlightning.settings import without_secrets
from agentlightning.store import open_store
from tests.common.environments import Environment
from tests.common.postgresql import PostgresServer
from tests.common.vllm import SCRIPTS, free_port
from tests.doctor.command import Said, doctor, run
from tests.server.process import StoreServer


def destination(store: str | Path, *arguments: str, **changes: str) -> Said:
    """Run `agl doctor --quick` with this AGL_STORE, where packages for every kind of store are."""
    return run(SCRIPTS / "agl", "doctor", "--quick", *arguments, AGL_STORE=str(store), **changes)


def the_problem(said: Said) -> str:
    assert (said.status, said.stderr) == (1, ""), said.stdout
    assert said.text.endswith("1 problem.")
    _, _, problem = said.text.partition("problem AGL_STORE ")
    return problem


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / "run.db"


def test_a_folder_that_does_not_exist_is_named(pristine: Environment) -> None:
    said = doctor(pristine, "--quick", AGL_STORE="/nonexist/x.db")

    assert the_problem(said).startswith(
        "/nonexist/x.db cannot be opened: No such file or directory, since there is no folder /nonexist -> create the "
        "folder, or give the path of another file"
    )


def test_json_has_the_problem_and_its_advice(pristine: Environment) -> None:
    said = doctor(pristine, "--quick", "--json", AGL_STORE="/nonexist/x.db")

    assert said.status == 1
    assert said.json["ok"] is False
    [problem] = [finding for finding in said.json["findings"] if finding["mark"] == "problem"]
    assert problem["subject"] == "AGL_STORE"
    assert problem["advice"] == "create the folder, or give the path of another file"


def test_a_file_that_a_server_would_create_is_not_created(pristine: Environment, path: Path) -> None:
    said = doctor(pristine, "--quick", AGL_STORE=f" {path} ")

    assert said.status == 0, said.stdout
    assert f"ok AGL_STORE a server creates {path} when it starts" in said.text
    assert [*path.parent.iterdir()] == []


def test_a_store_that_can_be_written_is_well(pristine: Environment, path: Path) -> None:
    open_store(str(path)).close()

    said = doctor(pristine, "--quick", AGL_STORE=str(path))

    assert said.status == 0, said.stdout
    assert f"ok AGL_STORE {path} can be written" in said.text


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (foreign, "{path} belongs to another program -> give the path of another file"),
        (Path.mkdir, "{path} is a folder -> give the path of a file in it, such as {path}/run.db"),
        (lambda path: path.write_text("a text " * 100), "{path} is not a SQLite file, or is damaged: "),
    ],
    ids=["of another program", "folder", "text"],
)
def test_a_path_of_something_else_has_fitting_advice(
    pristine: Environment, path: Path, make: Callable[[Path], object], problem: str
) -> None:
    make(path)

    said = doctor(pristine, "--quick", AGL_STORE=str(path))

    assert the_problem(said).startswith(problem.format(path=path))


def test_an_agl_store_that_does_not_answer_is_a_problem() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    problem = the_problem(destination(url))

    assert re.match(rf"{url} cannot be reached: .* -> is `agl store` running there, and can this machine", problem)


def test_a_plain_install_is_told_what_to_install_and_nothing_else(pristine: Environment) -> None:
    for arguments, changes in ((("--quick",), {"AGL_STORE": "http://x:1"}), (("--store", "http://x:1"), {})):
        said = doctor(pristine, *arguments, **changes)

        assert said.status == 1
        assert "a store over HTTP needs msgspec and urllib3 -> " in said.text
        assert said.text.count("-> ") == 1
        assert "AGL_STORE of the server" not in said.text


def test_a_key_that_the_store_does_not_accept_is_a_problem(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key="right") as server:
        wrong = destination(server.url, AGL_STORE_KEY="wr0ng")
        read = run(SCRIPTS / "agl", "doctor", "--store", server.url, AGL_STORE_KEY="wr0ng")
        right = destination(server.url, AGL_STORE_KEY="right")

    advice = f"{server.url} does not accept this key -> set AGL_STORE_KEY to its key, or put that into the URL"
    assert the_problem(wrong).startswith(advice)
    assert f"problem store {advice}" in read.text
    assert read.text.count("-> ") == 1
    assert "wr0ng" not in wrong.stdout + read.stdout
    assert f"ok AGL_STORE {server.url} answers" in right.text
    assert right.status == 0


def test_postgresql_that_is_away_is_a_problem(postgresql: PostgresServer) -> None:
    url = re.sub(r":\d+/", f":{free_port()}/", postgresql.url("any").replace("//agl@", "//agl:s3cret@"))

    for said in (destination(url), run(SCRIPTS / "agl", "doctor", "--store", url)):
        assert said.status == 1
        assert f"{without_secrets(url)} cannot be used now: " in said.text
        assert "-> is PostgreSQL running there, and does it let this machine in?" in said.text
        assert said.text.count("-> ") == 1
        assert "s3cret" not in said.stdout


def test_another_programs_tables_in_postgresql_are_a_problem(postgresql: PostgresServer) -> None:
    url = postgresql.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA agentlightning CREATE TABLE generations (theirs integer)")

    for said in (destination(url), run(SCRIPTS / "agl", "doctor", "--store", url)):
        assert said.status == 1
        assert "has tables of another program -> give another database" in said.text
        assert said.text.count("-> ") == 1


def test_an_empty_postgresql_database_is_left_empty(postgresql: PostgresServer) -> None:
    url = postgresql.new_database()

    said = destination(url)

    assert said.status == 0, said.stdout
    assert f"ok AGL_STORE a server creates its tables in {without_secrets(url)} when it starts" in said.text
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'agentlightning'").fetchone()
    assert found == (0,)
