"""Tests of the SQLite file: its layout, migrations, refusals, and network file systems."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.store import Store, filesystem, open_store, sqlite
from tests.common.generations import FULL, generation

pytestmark = pytest.mark.tier("check")

NOT_THERE = os.strerror(errno.ENOENT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with open_store(str(path)) as store:
        yield store


def ids(store: Store, **filters: Any) -> list[str]:
    return [found.id for found in store.generations(**filters)]


def query(path: Path, statement: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchone()[0]


def test_file_has_little_endian_int32_ids_and_float32_logprobs(store: Store, path: Path) -> None:
    store.add([FULL])

    assert query(path, "SELECT hex(prompt_token_ids) FROM generations") == "0000000001000000FFFFFF7FFFFFFFFF"
    assert query(path, 'SELECT hex(token_ids) FROM choices WHERE "index" = 0') == "0700000008000000"
    assert query(path, 'SELECT hex(logprobs) FROM choices WHERE "index" = 0') == "CDCCCCBD000080FF"


def test_iteration_blocks_neither_writers_nor_the_emptying_of_the_wal(store: Store, path: Path) -> None:
    kept = [generation(number) for number in range(500)]
    store.add(kept)
    reading = store.generations()
    first = next(reading)

    with open_store(str(path)) as another:
        another.add([generation(500)])
    assert query(path, "PRAGMA wal_checkpoint(TRUNCATE)") == 0
    assert os.path.getsize(f"{path}-wal") == 0

    assert [found.id for found in (first, *reading)] == [*(each.id for each in kept), *ids(store)[500:]]


def test_new_file_is_accessible_only_to_its_owner(path: Path) -> None:
    before = os.umask(0)
    try:
        with open_store(str(path)) as store:
            store.add([generation(1)])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)

    assert modes == {path.name: 0o600, f"{path.name}-wal": 0o600, f"{path.name}-shm": 0o600}


def test_new_file_has_wal_mode_large_pages_and_the_application_id(store: Store, path: Path) -> None:
    store.add([generation(1)])

    assert query(path, "PRAGMA journal_mode") == "wal"
    assert query(path, "PRAGMA page_size") == 16384
    assert query(path, "PRAGMA application_id").to_bytes(4, "big") == b"AgL1"


@pytest.mark.parametrize("url", ["{}", "sqlite:///{}", "runs.db", "sqlite:///runs.db", "a b?c#d%20.db"])
def test_open_by_path_or_url_finds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / url.removeprefix("sqlite:///").format("runs.db")

    with open_store(url.format(file)) as store:
        store.add([generation(1)])

    assert query(file, "SELECT count(*) FROM generations") == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mongodb://host", "mongodb:// is not a store"),
        ("sqlite://generations.db", "write sqlite:///PATH"),
        ("sqlite:///", "needs the path of a file"),
        ("sqlite:///:memory:", "needs the path of a file"),
        (":memory:", "needs the path of a file"),
        ("", "needs the path of a file"),
    ],
)
def test_open_of_an_invalid_url_gives_the_reason(url: str, reason: str) -> None:
    with pytest.raises(StoreRefused, match=reason):
        open_store(url)


def test_open_without_sqlalchemy_gives_the_install_command(tmp_path: Path) -> None:
    (tmp_path / "sqlalchemy.py").write_text("raise ImportError\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import agentlightning.store as s; s.open_store('a.db')"
    )

    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)

    install = f"{sys.executable} -m pip install 'sqlalchemy>=2'"
    assert result.stderr.splitlines()[-1].endswith(f"StoreRefused: a SQLite store needs SQLAlchemy: {install}")
    assert not (tmp_path / "a.db").exists()


def test_open_for_reading_makes_no_file(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=f"{path} cannot be opened: {NOT_THERE}"):
        open_store(str(path), read_only=True)

    assert not path.exists()


def test_open_in_a_missing_folder_gives_the_path(tmp_path: Path) -> None:
    with pytest.raises(
        StoreUnavailable,
        match=rf"missing/a\.db cannot be opened: {NOT_THERE}, since there is no folder {tmp_path}/missing: create",
    ):
        open_store(str(tmp_path / "missing" / "a.db"))


def test_open_of_an_empty_file_makes_it_a_store(path: Path) -> None:
    path.touch()

    with open_store(str(path)) as store:
        store.add([generation(1)])

    assert query(path, "PRAGMA page_size") == 16384


def test_database_of_another_program_is_refused_and_unchanged(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE generations (theirs)")
    before = path.read_bytes()

    with pytest.raises(StoreRefused, match=f"{path} belongs to another program"):
        open_store(str(path))

    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_file_that_is_not_a_database_is_refused_and_unchanged(path: Path) -> None:
    path.write_text("a text, and a longer one than the header of a database is\n" * 100)
    before = path.read_bytes()

    with pytest.raises(StoreRefused, match=f"{path} is not a SQLite file, or is damaged: "):
        open_store(str(path))

    assert path.read_bytes() == before


def test_damaged_file_is_refused_when_the_damage_is_read(path: Path) -> None:
    with open_store(str(path)) as store:
        store.add([generation(number) for number in range(2_000)])
    # Behind the schema, which is read when a file is opened.
    sound = path.stat().st_size * 3 // 4
    with path.open("r+b") as file:
        file.seek(sound)
        file.write(b"\xff" * (path.stat().st_size - sound))

    with (
        open_store(str(path)) as store,
        pytest.raises(StoreRefused, match=f"{path} is not a SQLite file, or is damaged: "),
    ):
        ids(store)


def test_file_of_a_newer_schema_is_refused_and_unchanged(path: Path) -> None:
    newer = sqlite.VERSION + 1
    open_store(str(path)).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    before = path.read_bytes()

    with pytest.raises(StoreRefused, match=rf"by a newer \w+ \(schema {newer}, this one knows {sqlite.VERSION}\)"):
        open_store(str(path))

    assert path.read_bytes() == before


def test_migration_from_an_older_schema_runs_each_step_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the present schema as an old one with two migrations after it."""
    kept = [generation(number) for number in range(10)]
    with open_store(str(path)) as store:
        store.add(kept)
    today = sqlite.VERSION
    steps = {
        today: ("ALTER TABLE losses ADD COLUMN note TEXT", "UPDATE losses SET note = 'of the first step'"),
        today + 1: ("CREATE TABLE notes (note TEXT)", "INSERT INTO notes VALUES ('of the second step')"),
    }
    monkeypatch.setattr(sqlite, "VERSION", today + 2)
    monkeypatch.setattr(sqlite, "MIGRATIONS", steps)

    with open_store(str(path)) as store:
        assert [*store.generations()] == kept

    assert query(path, "PRAGMA user_version") == today + 2
    assert query(path, "SELECT note FROM notes") == "of the second step"
    # The steps are not run again.
    open_store(str(path)).close()
    assert query(path, "SELECT count(*) FROM notes") == 1


def test_migration_that_fails_leaves_the_file_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(str(path)) as store:
        store.add([generation(1)])
    today = sqlite.VERSION
    with monkeypatch.context() as newer:
        newer.setattr(sqlite, "VERSION", today + 1)
        newer.setattr(
            sqlite, "MIGRATIONS", {today: ("CREATE TABLE notes (note TEXT)", "CREATE TABLE generations (again)")}
        )
        with pytest.raises(StoreUnavailable, match=f"{path} cannot be used now: "):
            open_store(str(path))

    assert query(path, "PRAGMA user_version") == today
    assert query(path, "SELECT count(*) FROM sqlite_master WHERE name = 'notes'") == 0
    with open_store(str(path)) as store:
        assert [*store.generations()] == [*store.generations(rollout_id="rollout-0")] != []


def test_write_to_a_replaced_file_is_refused(store: Store, path: Path) -> None:
    store.add([generation(1)])
    path.rename(path.with_suffix(".old"))

    with pytest.raises(StoreUnavailable, match=NOT_THERE):
        store.add([generation(2)])
    open_store(str(path)).close()
    with pytest.raises(StoreUnavailable, match="was replaced since it was opened"):
        store.add([generation(2)])


MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/vdb /home/local\\040disk xfs rw 0 0
//server/share /mnt cifs rw 0 0
/dev/vdc /mnt ext4 rw 0 0
me@host: /remote fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/a.db", None),
        ("/home/me/a.db", "nfs4"),
        ("/homeless/a.db", None),
        ("/home/local disk/a.db", None),
        ("/mnt/a.db", None),
        ("/remote/deep/below/a.db", "fuse.sshfs"),
    ],
)
def test_network_file_system_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str | None
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mounts")

    # None of these folders exists, so an accepted path fails later.
    with pytest.raises((StoreRefused, StoreUnavailable)) as refused:
        open_store(path, read_only=True)

    if kind is None:
        assert NOT_THERE in str(refused.value)
    else:
        assert f"{path} is on a network file system ({kind})" in str(refused.value)


def test_link_into_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"/dev/vda / ext4 rw 0 0\nserver:/ {tmp_path}/remote nfs rw 0 0\n")
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "link").symlink_to(tmp_path / "remote")

    with pytest.raises(StoreRefused, match="network file system"):
        open_store(str(tmp_path / "link" / "a.db"))


def test_path_counts_as_local_where_mounts_are_unknown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MOUNTS", Path("/nowhere"))

    with open_store(str(path)) as store:
        assert store.add([generation(1)]) == 1
