"""Tests of stores that are opened for reading only: nothing changes, neither a byte of a file nor the list of files."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import Loss
from agentlightning.rollout_records import RolloutConfig
from agentlightning.store import Store, open_database, open_store, sqlite, tables
from tests.common.generations import START, generation
from tests.common.processes import SECONDS, fork

pytestmark = pytest.mark.tier("check")

COUNT = 100
OLDER = rf"by an older agentlightning \(schema {sqlite.VERSION - 1}, this one reads {sqlite.VERSION}\): "


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def fill(path: Path) -> Store:
    """Write a store, part of which is in its file, and the other in its log; return it while it is open."""
    with open_store(str(path)) as store:
        store.add([generation(number) for number in range(COUNT // 2)])
    store = open_store(str(path))
    store.add([generation(number) for number in range(COUNT // 2, COUNT)])
    return store


@contextmanager
def closed(path: Path) -> Iterator[None]:
    fill(path).close()
    assert {each.name for each in path.parent.iterdir()} == {path.name}
    yield


@contextmanager
def held_by(opened: Callable[[Path], Store], path: Path) -> Iterator[None]:
    """Let another process open the store, and hold it open: SQLite shares its locks and memory within a process."""
    is_open, is_over = fork.Event(), fork.Event()

    def hold() -> None:
        with opened(path):
            is_open.set()
            is_over.wait(SECONDS)

    process = fork.Process(target=hold)
    process.start()
    assert is_open.wait(SECONDS)
    yield
    is_over.set()
    process.join(SECONDS)


def being_written(path: Path) -> AbstractContextManager[None]:
    return held_by(fill, path)


@contextmanager
def just_opened(path: Path) -> Iterator[None]:
    fill(path).close()
    with held_by(lambda path: open_store(str(path)), path):
        yield


def copied(*suffixes: str) -> Callable[[Path], AbstractContextManager[None]]:
    """Return a store as a killed writer leaves it, with these of the files beside it."""

    @contextmanager
    def copied(path: Path) -> Iterator[None]:
        origin = path.parent.with_name("origin") / path.name
        origin.parent.mkdir()
        with fill(origin):
            for suffix in ("", *suffixes):
                shutil.copy(f"{origin}{suffix}", f"{path}{suffix}")
        yield

    return copied


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # SQLite takes the path as a URI.
    folder = tmp_path / "a b?c#d%20"
    folder.mkdir()
    return folder / "run.db"


@pytest.mark.parametrize(
    "state",
    [closed, being_written, just_opened, copied("-wal", "-shm"), copied("-wal")],
    ids=["closed", "being written", "just opened", "after a kill", "copied with its log"],
)
def test_read_in_any_state_gives_everything_and_changes_nothing(
    path: Path, state: Callable[[Path], AbstractContextManager[None]]
) -> None:
    expected = [generation(number).request_id for number in range(COUNT)]

    with state(path), unchanged(path.parent):
        with open_store(str(path), read_only=True) as store:
            assert [each.request_id for each in store.generations()] == expected
        with closing(open_database(str(path), read_only=True)) as database, database.reading() as connection:
            found = connection.execute(select(tables.generations.c.request_id).order_by(tables.generations.c.key))
            assert [*found.scalars()] == expected
            while_open = contents(path.parent)
        assert while_open == contents(path.parent)


def test_read_while_others_write_sees_what_they_have_written(path: Path) -> None:
    fill(path).close()
    with open_store(str(path), read_only=True) as reader:
        assert sum(reader.tally().values()) == COUNT
        with open_store(str(path)) as writer:
            writer.add([generation(COUNT)])
            assert sum(reader.tally().values()) == COUNT + 1
        assert sum(reader.tally().values()) == COUNT + 1
        assert reader.statistics()["total_generations"] == COUNT + 1


def test_write_into_the_file_while_it_is_read_is_noticed(path: Path) -> None:
    fill(path).close()

    def read_while_another_writes() -> None:
        with closing(open_database(str(path), read_only=True)) as database, database.reading() as connection:
            connection.execute(tables.generations.select().limit(1)).all()
            # Closing the last connection copies the log into the file.
            with open_store(str(path)) as writer:
                writer.add([generation(COUNT)])

    with pytest.raises(StoreUnavailable, match=f"{re.escape(str(path))} was written while it was read: run it again"):
        read_while_another_writes()


def test_overdue_attempt_stays_as_it_is(path: Path) -> None:
    with open_store(str(path)) as store:
        rollout = store.start_rollout({}, config=RolloutConfig(timeout_seconds=1e-9))

    with unchanged(path.parent), open_store(str(path), read_only=True) as reader:
        [found] = reader.query_rollouts()
        assert found.status == "preparing"
        assert [each.status for each in reader.query_attempts(rollout.rollout_id)] == ["preparing"]

    with open_store(str(path)) as store:
        assert [each.status for each in store.query_rollouts()] == ["failed"]


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.add([generation(1)]),
        lambda store: store.enqueue_rollout({}),
        lambda store: store.dequeue_rollout(),
        lambda store: store.add_losses([Loss(count=1, reason="x", first_at=START, last_at=START, host="h", pid=1)]),
    ],
    ids=["add", "enqueue", "dequeue", "add losses"],
)
def test_write_is_refused(path: Path, write: Callable[[Store], object]) -> None:
    fill(path).close()

    with (
        unchanged(path.parent),
        open_store(str(path), read_only=True) as store,
        pytest.raises(StoreRefused, match="was opened for reading only: open it without read_only"),
    ):
        write(store)


def older(path: Path) -> None:
    fill(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {sqlite.VERSION - 1}")


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.touch, r"has no store in it: a server that records there, or `agl store`, creates it"),
        (older, OLDER + r"run `agl migrate --store .*run\.db`, or"),
        (foreign, r"belongs to another program: give the path of another file"),
        (
            Path.mkdir,
            r"run\.db is a folder: give the path of a file in it, such as .*run\.db/run\.db",
        ),
        (lambda path: path.write_text("a text " * 100), r"is not a SQLite file, or is damaged: .*: give the path of"),
    ],
    ids=["empty", "older", "of another program", "folder", "text"],
)
def test_open_of_another_file_gives_the_reason_and_changes_nothing(
    path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(path)

    with unchanged(path.parent), pytest.raises((StoreRefused, StoreUnavailable), match=reason):
        open_store(str(path), read_only=True)
