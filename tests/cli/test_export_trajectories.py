"""`agl export --what trajectories`: rows for trainers, in files and folders that others open."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from agentlightning.cli import export, formats
from agentlightning.generation import Choice, Generation, RoutedExperts, SamplingMask
from agentlightning.store import calls, open_store
from tests.common.generations import START, generation
from tools.peer import environment

pytestmark = pytest.mark.tier("check")


def call(rollout: int, turn: int, prompt: list[int], answer: list[int], **fields: Any) -> Generation:
    choice = Choice(
        token_ids=array("i", answer),
        logprobs=array("f", [-0.5] * len(answer)),
        finish_reason="abort" if fields.get("status") == "aborted" else "stop",
        weight_versions=[("7", 0, len(answer))],
        routed_experts=RoutedExperts((1, 1, 1), array("h", [3])) if rollout == 0 else None,
        sampling_mask=SamplingMask.of_counts(array("I", [2] * len(answer)), array("i", [*answer, *answer]))
        if rollout == 0
        else None,
    )
    ids = {"rollout_id": f"r{rollout}", "attempt_id": "a"}
    usual = {**ids, "prompt_token_ids": array("i", prompt), "choices": [choice]}
    return generation(2 * rollout + turn, **{**usual, **fields})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Make a store of five rollouts of two calls, of which the last is aborted, and one that was created."""
    path = tmp_path / "store.db"
    with open_store(str(path)) as store:
        for number in range(5):
            status: Any = "aborted" if number == 4 else "finished"
            store.add([call(number, 0, [1, 2], [3]), call(number, 1, [1, 2, 3, 4], [5, 6], status=status)])
            store.add_reward(f"r{number}", "a", number / 4)
        created = store.start_rollout({"question": "Paris?"}, metadata={"group": "g"})
        store.add([call(9, 0, [1], [2], rollout_id=created.rollout_id, finished_at=START + 10**12)])
    return path


def exported(store: Path, *options: str | Path) -> int:
    return export.main(["--store", str(store), "--what", "trajectories", *map(str, options)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_and_parquet_have_the_same_rows(store: Path, tmp_path: Path) -> None:
    as_lines, as_table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"

    assert exported(store, "-o", as_lines) == exported(store, "--format", "parquet", "-o", as_table) == 0

    rows = lines(as_lines)
    table = pyarrow.parquet.read_table(as_table)
    assert table.to_pylist() == rows
    assert [row["response_mask"] for row in rows] == [[0, 0, 1, 0, 1, 1]] * 5 + [[0, 1]]
    assert [row["reward"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0, None]
    assert [row["input"] for row in rows] == [None] * 5 + ['{"question": "Paris?"}']
    assert rows[5]["group"] == "g"
    assert rows[0]["routed_experts"] == [[[3]], *[[[-1]]] * 5]
    assert rows[0]["missing_experts"] == 5
    assert rows[0]["sampling_mask"] == [[], [], [3, 3], [], [5, 6], [5, 6]]
    assert [row["sampling_mask"] for row in rows[1:]] == [None] * 5
    assert table.schema.field("token_ids").type == pyarrow.list_(pyarrow.int32())
    assert table.schema.field("response_mask").type == pyarrow.list_(pyarrow.int8())


def test_parameters_of_any_shape_are_json_texts(tmp_path: Path) -> None:
    path, as_lines, as_table = (tmp_path / name for name in ("store.db", "rows.jsonl", "rows.parquet"))
    params = {"logit_bias": {"5": 1.5}, "allowed_token_ids": [5, 6], "bad_words": ["no"], "min_tokens": 2}
    with open_store(str(path)) as store:
        store.add(
            [call(0, 0, [1], [2], sampling_params=json.dumps(params)), call(1, 0, [1], [2], sampling_params="{}")]
        )

    assert exported(path, "-o", as_lines) == exported(path, "--format", "parquet", "-o", as_table) == 0

    rows = lines(as_lines)
    assert pyarrow.parquet.read_table(as_table).to_pylist() == rows
    known, usual = (row["spans"][0]["sampling"] for row in rows)
    assert (json.loads(known["logit_bias"]), json.loads(known["allowed_token_ids"])) == ({"5": 1.5}, [5, 6])
    assert (json.loads(known["bad_words"]), known["min_tokens"]) == (["no"], 2)
    assert [usual[name] for name in params] == [None, None, None, 0]


def test_fewer_rows_are_in_memory_at_once_where_experts_are_many(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "VALUES_AT_ONCE", 1)
    sizes: list[int] = []
    from_pylist = pyarrow.RecordBatch.from_pylist

    class Batch:
        @staticmethod
        def from_pylist(rows: list[Any], schema: Any) -> Any:
            sizes.append(len(rows))
            return from_pylist(rows, schema)

    monkeypatch.setattr(pyarrow, "RecordBatch", Batch)

    for what in ("trajectories", "generations"):
        assert exported(store, "--what", what, "--format", "parquet", "-o", tmp_path / f"{what}.parquet") == 0

    # The calls of the first rollout have experts: one row, or two generations.
    assert sizes == [1, 5, 1, 1, 9]


@pytest.mark.parametrize(
    ("options", "rollouts"),
    [
        (("--rollout", "r2"), ["r2"]),
        (("--status", "finished", "--min-reward", "0.5"), ["r2", "r3"]),
        (("--complete", "--min-reward", "0.75"), ["r3"]),
        (("--weight-version", "9", "--max-staleness", "2", "--rollout", "r1"), ["r1"]),
        (("--weight-version", "9"), []),
        (("--drift", "transition", "--rollout", "r0"), ["r0", "r0"]),
        (("--max-prompt-length", "1", "--min-reward", "0"), []),
    ],
)
def test_options_choose_rows(store: Path, tmp_path: Path, options: tuple[str, ...], rollouts: list[str]) -> None:
    assert exported(store, *options, "-o", tmp_path / "rows.jsonl") == 0

    assert [row["rollout_id"] for row in lines(tmp_path / "rows.jsonl")] == rollouts


def test_lengths_cut_rows(store: Path, tmp_path: Path) -> None:
    cut = ("--rollout", "r0", "--max-length", "5", "--drift", "realign", "--drift-limit", "1")

    assert exported(store, *cut, "--max-response-length", "9", "-o", tmp_path / "rows.jsonl") == 0

    (row,) = lines(tmp_path / "rows.jsonl")
    assert (row["token_ids"], row["flags"]) == ([1, 2, 3, 4, 5], ["cut"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_long_export_is_written_in_parts_that_datasets_reads_as_one(store: Path, tmp_path: Path, kind: Any) -> None:
    folder = tmp_path / "rows"

    assert (
        exported(store, "--rows-per-file", "3", "--complete", "--min-reward", "0", "--format", kind, "-o", folder) == 0
    )

    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"part-00000.{kind}", f"part-00001.{kind}"]
    loader = "json" if kind == "jsonl" else "parquet"
    found: Any = datasets.load_dataset(
        loader, data_files=str(folder / f"*.{kind}"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found["rollout_id"][:] == ["r0", "r1", "r2", "r3"]


READERS = ("duckdb==1.4.2", "polars==1.35.2")
READ = """
import json, sys
import duckdb, polars
parts = sys.argv[1] + "/*.parquet"
columns = "rollout_id", "token_ids", "response_mask", "logprobs", "reward"
of_polars = polars.read_parquet(parts).select(columns).rows()
of_duckdb = duckdb.sql(f"SELECT {', '.join(columns)} FROM '{parts}' ORDER BY filename, file_row_number").fetchall()
print(json.dumps([of_polars, of_duckdb]))
"""


@pytest.mark.tier("all")
def test_polars_and_duckdb_read_the_parts_as_one_table(store: Path, tmp_path: Path) -> None:
    python = environment("readers", "polars and DuckDB", READERS, date="2026-11-30") / "python"
    folder = tmp_path / "rows"
    assert exported(store, "--rows-per-file", "3", "--format", "parquet", "-o", folder) == 0

    ran = subprocess.run([python, "-c", READ, folder], capture_output=True, text=True, check=True)

    assert exported(store, "-o", tmp_path / "rows.jsonl") == 0
    columns = ("rollout_id", "token_ids", "response_mask", "logprobs", "reward")
    rows = [[row[column] for column in columns] for row in lines(tmp_path / "rows.jsonl")]
    assert json.loads(ran.stdout) == [rows, rows]


def test_as_many_rows_as_fit_a_file_make_one_part(store: Path, tmp_path: Path) -> None:
    assert exported(store, "--rows-per-file", "6", "-o", tmp_path / "rows") == 0
    assert exported(store, "--rows-per-file", "6", "--rollout", "nobody", "-o", tmp_path / "none") == 0

    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["part-00000.jsonl"]
    assert [path.read_text() for path in (tmp_path / "none").iterdir()] == [""]


def test_a_folder_with_files_is_refused_before_anything_is_read(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(store, "--rows-per-file", "1", "-o", store) == 1
    assert "not a folder" in capsys.readouterr().err
    assert exported(store, "--rows-per-file", "1", "-o", tmp_path) == 1
    assert "has files already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--session", "s"), "trajectories cannot be filtered by --session"),
        (("--rows-per-file", "2"), "name a folder with -o"),
        (("--rows-per-file", "0", "-o", "x"), "must be at least 1, not 0"),
        (("--rows-per-file", "many", "-o", "x"), "invalid _positive value: 'many'"),
        (("--max-length", "-1"), "max_length: must not be negative"),
        (("--max-staleness", "1"), "max_staleness: needs a weight_version"),
        (("--drift", "guess"), "invalid choice: 'guess'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    store: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(SystemExit):
        exported(store, *options)

    assert reason in capsys.readouterr().err


def test_an_object_is_replaced_only_by_force(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    url = path.as_uri()
    assert exported(store, "-o", url) == 0
    written = path.read_text()
    capsys.readouterr()

    with monkeypatch.context() as patched:
        patched.setattr(export, "open_store", lambda *_, **__: pytest.fail("the store was opened"))
        assert exported(store, "--rollout", "r0", "-o", url) == 1
    assert f"agl export: {url} exists: give --force to replace it, or another -o" in capsys.readouterr().err
    assert path.read_text() == written

    assert exported(store, "--rollout", "r0", "--force", "-o", url) == 0
    assert path.read_text() == written.splitlines(keepends=True)[0]


def test_an_object_that_appears_meanwhile_is_not_replaced(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"

    def write(*_: Any) -> int:
        path.write_text("of another export")
        return 1

    monkeypatch.setitem(export.WRITERS, "jsonl", write)

    assert exported(store, "-o", path.as_uri()) == 1
    assert "exists: give --force" in capsys.readouterr().err
    assert path.read_text() == "of another export"


def test_each_part_has_its_own_object_where_the_url_has_options(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()

    assert exported(store, "--rows-per-file", "2", "-o", f"{folder.as_uri()}?use_mmap=true") == 0

    parts = sorted(folder.iterdir())
    assert [path.name for path in parts] == [f"part-0000{number}.jsonl" for number in range(3)]
    assert [len(lines(path)) for path in parts] == [2, 2, 2]


def test_an_object_needs_a_name_of_its_own(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(store, "-o", f"{tmp_path.as_uri()}/") == 1

    assert "is a folder: name an object in it, or give --rows-per-file" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--format", "parquet"), ("--rows-per-file", "2")])
def test_an_object_store_without_pyarrow_says_what_to_install(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    # An entry of None is a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert exported(store, *more, "-o", "s3://bucket/rows") == 1

    assert "an object store needs pyarrow: " in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://host/rows.jsonl", "s3://"])
def test_an_unknown_object_store_is_refused_with_a_sentence(
    store: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert exported(store, "-o", url) == 1

    assert f"agl export: {url} cannot be written" in capsys.readouterr().err


def test_a_rollout_that_is_too_large_is_named_and_the_others_are_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calls, "MOST_CALLS", 1)

    assert exported(store, "--rollout", "r0", "-o", tmp_path / "one.jsonl") == 1
    assert "agl export: the rollout 'r0' has 2 calls, more than are read at once" in capsys.readouterr().err
    assert not (tmp_path / "one.jsonl").exists()
    assert exported(store, "-o", tmp_path / "rows.jsonl") == 0
    assert len(lines(tmp_path / "rows.jsonl")) == 1
