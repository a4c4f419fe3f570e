"""`agl prune` and `agl migrate`, as whoever types them sees them."""

from __future__ import annotations

import json
import sqlite3
from array import array
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentlightning.cli import main
from agentlightning.store import open_store
from agentlightning.store.chains import FIRST
from tests.common.generations import generation

pytestmark = pytest.mark.tier("check")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make a store with two rollouts that were only recorded, long ago, and one under way."""
    path = tmp_path / "store.db"
    with open_store(str(path)) as store:
        long = array("i", range(10 * FIRST))
        store.add([generation(n, rollout_id=f"ro-{n % 2}", prompt_token_ids=long, finished_at=n) for n in range(4)])
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prune_deletes_what_a_dry_run_announces(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("prune", "--store", path, "--older-than", "7d")

    dry = printed(capsys, *wanted, "--dry-run")
    real = printed(capsys, *wanted)

    assert (dry["dry_run"], dry["rollouts"], dry["generations"]) == (True, 2, 4)
    assert {name: real[name] for name in dry} == {**dry, "dry_run": False, "bytes": real["bytes"]}
    assert real["bytes"] >= dry["bytes"] > 3 * FIRST
    assert real["size_after"] < real["size_before"]
    assert real["advice"] is None
    assert printed(capsys, *wanted)["rollouts"] == 0


def test_prune_says_in_words_what_it_did(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["prune", "--store", str(path), "--rollout", "ro-0", "--rollout", "ro-1"]

    assert main([*wanted, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("Would delete 2 rollouts, 4 generations, 157 blocks: about ")
    assert main(wanted) == 0
    assert capsys.readouterr().out.startswith("Deleted 2 rollouts, 4 generations, 157 blocks, ")
    assert main(wanted) == 0
    assert capsys.readouterr().out.startswith("Deleted nothing; ")


def test_prune_without_a_selection_deletes_no_rollout(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "prune", "--store", path)

    assert (found["rollouts"], found["generations"], found["blocks"]) == (0, 0, 0)


def test_prune_refuses_a_rollout_under_way_by_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(str(path)) as store:
        rollout_id = store.start_rollout("a task").rollout_id

    assert main(["prune", "--store", str(path), "--rollout", "ro-0", "--rollout", rollout_id]) == 1

    assert f"agl prune: a rollout that is under way cannot be deleted: '{rollout_id}' is preparing;" in (
        capsys.readouterr().err
    )
    with open_store(str(path)) as store:
        assert len([*store.generations(rollout_id="ro-0")]) == 2


@pytest.mark.parametrize("age", ["7", "d", "-1d", "7 days", ""])
def test_prune_refuses_what_is_no_age(path: Path, age: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--store", str(path), f"--older-than={age}"])

    assert "write it like 90s, 30m, 12h, 7d or 2w" in capsys.readouterr().err


def test_file_of_an_older_version_keeps_its_size_until_it_is_rewritten(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add_long_ones() -> None:
        with open_store(str(path)) as store:
            store.add(
                [generation(n, prompt_token_ids=array("i", range(n, n + 50_000)), finished_at=n) for n in range(20)]
            )

    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
    add_long_ones()

    first = printed(capsys, "prune", "--store", path, "--older-than", "1s")
    assert first["bytes"] > 20 * 50_000
    assert first["size_after"] == pytest.approx(first["size_before"], rel=0.05)
    assert f"agl prune --store {path} --vacuum" in first["advice"]
    second = printed(capsys, "prune", "--store", path, "--vacuum")
    assert second["size_after"] < first["size_after"] / 2
    add_long_ones()
    third = printed(capsys, "prune", "--store", path, "--older-than", "1s")
    assert third["size_after"] == pytest.approx(second["size_after"], rel=0.05)
    assert third["advice"] is None


@pytest.mark.parametrize("command", [("prune", "--vacuum"), ("migrate",)])
def test_url_of_a_server_is_refused_with_where_to_run_it(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--store", "http://agl:secret@store:4747"]) == 1

    said = capsys.readouterr().err
    assert "http://***@store:4747 is an agl store" in said
    assert "run it on the store's own host" in said


@pytest.mark.parametrize("command", ["prune", "migrate"])
def test_missing_store_is_an_error_in_a_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--store", str(tmp_path / "none.db")]) == 1

    assert capsys.readouterr().err.startswith(f"agl {command}: ")
    assert not (tmp_path / "none.db").exists()


def test_migrate_changes_a_former_store_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = array("i", range(10 * FIRST))
    with open_store(str(path)) as store:
        before = [*store.generations()]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE generations SET prompt_token_ids = ?, ids_block = NULL", (whole.tobytes(),))

    assert printed(capsys, "migrate", "--store", path)["migrated"] == 4
    assert main(["migrate", "--store", str(path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with open_store(str(path)) as store:
        assert [*store.generations()] == before


def test_dry_run_leaves_a_store_of_an_older_version_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = path.read_bytes()

    assert main(["prune", "--store", str(path), "--older-than", "7d", "--dry-run"]) == 1

    assert "was written by an older agentlightning" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["prune", "migrate"])
def test_without_a_store_it_says_how_to_name_one(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGL_STORE", raising=False)

    with pytest.raises(SystemExit) as ended:
        main([command])

    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"agl {command}: which store? Give --store, or set AGL_STORE\n")
