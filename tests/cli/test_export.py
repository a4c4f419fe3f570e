"""`agl export`: what is in a store, in files that others open."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest

from agentlightning.generation import Choice, Generation, RoutedExperts, SamplingMask, TopLogprobs
from agentlightning.store import open_database, open_store, spans
from agentlightning.store.spans import NewSpan
from tests.common.forking import run_agl
from tests.common.generations import START, generation
from tests.common.terminal import on_terminal
from tests.common.vllm import SCRIPTS

SECONDS = 120
EXPORT = (str(SCRIPTS / "agl"), "export")

MEASURED = """\
import resource, sys
from agentlightning.cli.export import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    if any(name.startswith("PYTHON") for name in variables):
        # Python reads them when it starts.
        command, env = [*EXPORT, *arguments], environment(**variables)
        return subprocess.run(command, capture_output=True, env=env, timeout=SECONDS, check=False)
    return run_agl("export", *arguments, env=environment(**variables), timeout=SECONDS)


def environment(**variables: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AGL_")} | variables


def exported(*arguments: str | Path, **variables: str) -> list[dict[str, Any]]:
    result = run(*arguments, **variables)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    if rows:
        assert re.fullmatch(rf"agl export: \w+ written to stdout: {len(rows)}\n", result.stderr.decode())
    return rows


def refused(*arguments: str | Path, status: int = 1, **variables: str) -> str:
    """Return the one line of an export that does nothing, without the name of the command."""
    result = run(*arguments, **variables)
    assert (result.returncode, result.stdout) == (status, b"")
    lines = result.stderr.decode().splitlines()
    assert lines[1:] == (["see agl export --help"] if status == 2 else [])
    assert lines[0].startswith("agl export: ")
    return lines[0].removeprefix("agl export: ")


GENERATIONS = [generation(number) for number in range(25)]
GENERATIONS[3] = generation(
    # More than int32 has: a store takes what any client sends.
    3,
    retry=2**40,
    cached_tokens=2**40,
    session_id="a session",
    status="aborted",
    model="another model",
    prompt_text="größe \u2028 \N{GRINNING FACE} \0",
    trace_id="0af7651916cd43dd8448eb211c80319c",
    logprobs_mode="raw_logprobs",
    choices=[
        Choice(
            token_ids=array("i", [2**31 - 1, 0]),
            logprobs=array("f", [-0.25, -1.5]),
            text="two\nlines",
            finish_reason="stop",
            stop_reason=7,
            weight_versions=[("v1", 0, 1), ("v2", 1, 2)],
            routed_experts=RoutedExperts((2, 3, 2), array("h", range(12))),
            sampling_mask=SamplingMask(array("I", [0, 2, 3]), array("i", [2**31 - 1, 5, 0])),
            top_logprobs=TopLogprobs(
                array("I", [0, 2, 3]), array("i", [5, 2**31 - 1, 0]), array("f", [-2, -0.25, -1.5])
            ),
        ),
        Choice(index=1, token_ids=array("i"), finish_reason="abort", stop_reason="</s>"),
    ],
    # The first id of a prompt has none.
    prompt_logprobs=TopLogprobs(array("I", [0, *range(12)]), array("i", range(11)), array("f", [-0.5] * 11)),
)
GENERATIONS[4] = Generation(request_id="chatcmpl-4", finished_at=GENERATIONS[4].finished_at, status="error")


REWARD = NewSpan(
    rollout_id="r",
    attempt_id="a",
    sequence_id=None,
    trace_id="t",
    span_id="s",
    parent_id=None,
    name="agentlightning.annotation",
    start_time=None,
    end_time=None,
    response_id=None,
    reward=0.5,
    body=b'{"attributes": {}}',
)


def row(kept: Generation) -> dict[str, Any]:
    """Build the expected row: the fields, with `stop_reason` as text and versions by name."""
    written = kept.as_dict()
    for choice in written["choices"]:
        if choice["stop_reason"] is not None:
            choice["stop_reason"] = str(choice["stop_reason"])
        if choice["weight_versions"] is not None:
            choice["weight_versions"] = [
                {"version": version, "start": start, "end": end} for version, start, end in choice["weight_versions"]
            ]
    return written


ROWS = [row(kept) for kept in GENERATIONS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    with open_store(str(path)) as opened:
        opened.add(GENERATIONS)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "generations.db"
    with open_store(str(path)) as opened:
        for first in range(0, 320, 40):
            opened.add([generation(number, prompt=50_000) for number in range(first, first + 40)])
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def file(store: Path, tmp_path: Path, kind: str) -> Path:
    """All that is in the store, in a file of each kind."""
    file = tmp_path / f"generations.{kind}"
    result = run("--store", store, "--format", kind, "-o", file)
    said = f"agl export: generations written to {file}: {len(ROWS)}\n"
    assert (result.returncode, result.stdout, result.stderr.decode()) == (0, b"", said)
    return file


def test_jsonl_has_a_line_for_each_generation_with_its_fields(store: Path) -> None:
    assert exported("--store", store) == ROWS


def test_parquet_has_a_row_for_each_generation_with_its_fields_and_ids_as_int32(store: Path) -> None:
    result = run("--store", store, "--format", "parquet", "-o", "-")

    assert (result.returncode, result.stderr) == (0, b"agl export: generations written to stdout: 25\n")
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(result.stdout))
    assert table.to_pylist() == ROWS
    known = table.to_pylist()[3]
    assert known["choices"][0]["sampling_mask"] == [[2**31 - 1, 5], [0]]
    assert [[each["id"] for each in of_id] for of_id in known["choices"][0]["top_logprobs"]] == [[5, 2**31 - 1], [0]]
    assert known["prompt_logprobs"][:2] == [[], [{"id": 0, "logprob": -0.5}]]
    assert table.schema.names == list(Generation.__slots__)
    assert table.schema.field("prompt_token_ids").type == pyarrow.list_(pyarrow.int32())
    choice = table.schema.field("choices").type.value_type
    assert choice.names == list(Choice.__slots__)
    assert choice.field("token_ids").type == pyarrow.list_(pyarrow.int32())
    assert choice.field("logprobs").type == pyarrow.list_(pyarrow.float32())


def test_pandas_opens_it(file: Path, kind: str) -> None:
    frame = pandas.read_parquet(file) if kind == "parquet" else pandas.read_json(file, lines=True)

    assert list(frame["id"]) == [each["id"] for each in ROWS]
    assert [None if ids is None else list(ids) for ids in frame["prompt_token_ids"]] == [
        each["prompt_token_ids"] for each in ROWS
    ]
    assert list(frame["choices"][3][0]["token_ids"]) == [2**31 - 1, 0]


def test_hugging_face_datasets_opens_it(file: Path, kind: str, tmp_path: Path) -> None:
    builder = "parquet" if kind == "parquet" else "json"

    loaded = datasets.load_dataset(builder, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    assert loaded["id"][:] == [each["id"] for each in ROWS]
    assert loaded["prompt_token_ids"][:] == [each["prompt_token_ids"] for each in ROWS]
    assert loaded[3]["choices"][0]["token_ids"] == [2**31 - 1, 0]


LATE = 1_400
"""So many rows are longer than the 10 MiB that `datasets` takes types from, and have no more than they must."""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which only the last of many generations have all that they may have, and the last of them a reward."""
    path = tmp_path_factory.mktemp("sparse") / "store.db"
    of_all: dict[str, Any] = {"rollout_id": "r", "attempt_id": "a", "cached_tokens": None}
    known = {
        "session_id": "a session",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "cached_tokens": 7,
        "choices": GENERATIONS[3].choices,
    }
    with open_store(str(path)) as opened:
        for first in range(0, LATE + 100, 100):
            fields = of_all | (known if first >= LATE else {})
            opened.add([generation(number, prompt=1_600, **fields) for number in range(first, first + 100)])
    with contextlib.closing(open_database(str(path))) as database:
        database.write(lambda connection: spans.add(connection, [REWARD]))
    return path


@pytest.mark.parametrize("what", ["generations", "triplets"])
def test_long_jsonl_whose_fields_are_null_for_long_is_opened_in_one_line_as_documented(
    sparse: Path, tmp_path: Path, what: str
) -> None:
    file = tmp_path / "file.jsonl"
    assert run("--store", sparse, "--what", what, "-o", file).returncode == 0
    assert file.stat().st_size > 10 << 20
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("json", data_files=str(file), chunksize=1 << 30, split="train", cache_dir=cache)
    table = pyarrow.json.read_json(file, pyarrow.json.ReadOptions(block_size=1 << 30))
    frame = pandas.read_json(file, lines=True)
    assert len(frame) == len(rows)
    for found in (loaded[:], table.to_pydict()):
        assert list(found) == list(rows[0])
        for name in ("session_id", "trace_id", "cached_tokens") if what == "generations" else ("reward",):
            assert found[name] == [row[name] for row in rows]
            assert (found[name][0], found[name][-1] is None) == (None, False)
    if what == "generations":
        for choices in (loaded[-1]["choices"], table["choices"][-1].as_py()):
            assert choices == rows[-1]["choices"]
            assert choices[0]["logprobs"]
            assert choices[0]["weight_versions"]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--rollout", "rollout-1"), range(10, 20)),
        (("--rollout", "../../rollout-1"), ()),
        (("--attempt", "attempt-2"), range(20, 25)),
        (("--session", "a session"), (3,)),
        (("--model", "another model"), (3,)),
        (("--status", "error"), (4,)),
        (("--rollout", "rollout-0", "--status", "aborted"), (3,)),
        (("--since", "2026-09-21T14:13:42Z"), (22, 23, 24)),
        (("--until", "2026-09-21T16:13:22+02:00"), (0, 1)),
        (("--since", "2026-09-21T14:13:24.5+00:00", "--until", "2026-09-21T14:13:26Z"), (5,)),
        (("--since", "2026-09-22"), ()),
    ],
)
def test_options_choose_among_them(store: Path, options: tuple[str, ...], numbers: range | tuple[int, ...]) -> None:
    assert START == 1_790_000_000_000_000_000  # 2026-09-21T14:13:20Z

    assert exported("--store", store, *options) == [ROWS[number] for number in numbers]


def test_a_moment_without_a_zone_is_in_local_time(store: Path) -> None:
    # Two hours ahead, without summer time; POSIX has the sign the other way round.
    assert exported("--store", store, "--until", "2026-09-21T16:13:22", TZ="AHEAD-2") == ROWS[:2]


def test_the_store_is_the_one_of_the_environment_if_none_is_given(store: Path) -> None:
    assert exported("--rollout", "rollout-2", AGL_STORE=str(store)) == ROWS[20:]


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two rollouts, the first of which has a reward for its last call."""
    path = tmp_path_factory.mktemp("rewarded") / "store.db"
    logprobs = array("f", [float("-inf"), -0.5])
    choice = Choice(
        token_ids=array("i", [1, 2]),
        logprobs=logprobs,
        weight_versions=[("v1", 0, 2)],
        routed_experts=RoutedExperts((13, 1, 2), array("h", range(26))),
        sampling_mask=SamplingMask(array("I", [0, 1, 3]), array("i", [1, 2, 7])),
    )
    kept = [generation(number, choices=[choice]) for number in (0, 1, 10)]
    kept[1] = Generation(
        request_id="1", rollout_id="rollout-0", attempt_id="b", finished_at=kept[1].finished_at, status="error"
    )
    with open_store(str(path)) as opened:
        opened.add(kept)
    reward = replace(REWARD, rollout_id="rollout-0", attempt_id="b")
    database = open_database(str(path))
    database.write(lambda connection: spans.add(connection, [reward]))
    database.close()
    return path


def triplets(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Build the expected rows."""
    with open_store(str(path)) as opened:
        return [each.as_dict() for each in opened.triplets(*arguments)]


def test_jsonl_has_a_line_for_each_triplet_with_its_fields(rewarded: Path) -> None:
    found = exported("--store", rewarded, "--what", "triplets")

    expected = triplets(rewarded)
    for each in (expected[0], expected[2]):
        each["logprobs"] = [None, -0.5]
        assert each["weight_versions"] == [{"version": "v1", "start": 0, "end": 2}]
        assert each["sampling_mask"] == [[1], [2, 7]]
        assert each["routed_experts"][:2] == [[[0, 1]], [[2, 3]]]
    assert found == expected
    assert [(each["rollout_id"], each["reward"]) for each in found] == [
        ("rollout-0", None),
        ("rollout-0", 0.5),
        ("rollout-1", None),
    ]


def test_parquet_has_a_row_for_each_triplet_with_its_fields_and_ids_as_int32(rewarded: Path, tmp_path: Path) -> None:
    file = tmp_path / "triplets.parquet"
    result = run("--store", rewarded, "--what", "triplets", "--format", "parquet", "-o", file)

    said = f"agl export: triplets written to {file}: 3\n"
    assert (result.returncode, result.stdout, result.stderr.decode()) == (0, b"", said)
    table = pyarrow.parquet.read_table(file)
    assert table.to_pylist() == triplets(rewarded)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    ids = "list<element: int32>"
    assert types == {
        **dict.fromkeys(types, "string"),
        "index": "int32",
        "retry": "int64",
        "prompt_token_ids": ids,
        "response_token_ids": ids,
        "logprobs": "list<element: float>",
        "reward": "double",
        "weight_versions": "list<element: struct<version: string, start: int32, end: int32>>",
        "routed_experts": "list<element: list<element: list<element: int16>>>",
        "sampling_mask": "list<element: list<element: int32>>",
    }


@pytest.mark.parametrize("chosen", [("rollout-0",), ("rollout-0", "b"), ("rollout-1",), ("rollout-1", "b"), ("none",)])
def test_triplets_are_chosen_by_rollout_and_attempt(rewarded: Path, chosen: tuple[str, ...]) -> None:
    options = [each for option in zip(("--rollout", "--attempt"), chosen, strict=False) for each in option]

    found = exported("--store", rewarded, "--what", "triplets", *options)
    assert [each["generation_id"] for each in found] == [each["generation_id"] for each in triplets(rewarded, *chosen)]


def test_logprobs_that_json_has_no_number_for_are_null_there(tmp_path: Path) -> None:
    path = tmp_path / "generations.db"
    choice = Choice(token_ids=array("i", [1, 2]), logprobs=array("f", [float("-inf"), -0.5]))
    with open_store(str(path)) as opened:
        opened.add([generation(1, choices=[choice, Choice(index=1)])])

    (only,) = exported("--store", path)

    assert [each["logprobs"] for each in only["choices"]] == [[None, -0.5], None]


def test_an_empty_store_makes_an_empty_file(tmp_path: Path, kind: str) -> None:
    path, file = tmp_path / "generations.db", tmp_path / "out"
    open_store(str(path)).close()

    result = run("--store", path, "--format", kind, "-o", file)

    assert (result.returncode, result.stderr) == (0, b"agl export: 0 generations: the store has no generations\n")
    assert len(pyarrow.parquet.read_table(file)) == 0 if kind == "parquet" else file.read_bytes() == b""


def test_the_file_is_its_owners_alone(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_stays_a_link_and_the_file_that_it_leads_to_is_replaced(store: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)

    assert run("--store", store, "--force", "-o", link).returncode == 0

    assert link.is_symlink()
    assert len(target.read_bytes().splitlines()) == len(ROWS)


def test_what_is_no_file_is_written_to_and_not_replaced(store: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    with subprocess.Popen([*EXPORT, "--store", store, "-o", fifo], env=environment()) as process:
        lines = fifo.read_bytes().splitlines()
        assert process.wait(SECONDS) == 0

    assert len(lines) == len(ROWS)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_an_export_that_fails_half_way_leaves_the_file_as_it_was(large: Path, tmp_path: Path, kind: str) -> None:
    broken, file = tmp_path / "broken.db", tmp_path / "out"
    broken.write_bytes(large.read_bytes())
    with broken.open("r+b") as half:
        half.seek(large.stat().st_size // 2)
        half.write(b"\xff" * (large.stat().st_size // 2))
    file.write_text("before")

    result = run("--store", broken, "--format", kind, "--force", "-o", file)

    assert result.returncode == 1
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith(f"agl export: {broken} is not a SQLite file, or is damaged: ")
    assert file.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("broken.db")} == {"out"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_interrupted_leaves_nothing(large: Path, tmp_path: Path, how: signal.Signals) -> None:
    command = [*EXPORT, "--store", large, "-o", tmp_path / "out"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + SECONDS
        while not any(path.stat().st_size for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=SECONDS)

    assert (process.returncode, stderr) == (-how, b"agl export: interrupted\n")
    assert [*tmp_path.iterdir()] == []


def test_a_reader_that_hangs_up_is_no_error(large: Path, kind: str) -> None:
    command = [*EXPORT, "--store", large, "--format", kind]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE


def test_a_bar_shows_how_far_it_is_on_a_terminal_alone(store: Path, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [*EXPORT, "--store", store, "-o", tmp_path / "out"]
    subprocess.run(command, env=environment(TERM="xterm"), stderr=its, timeout=SECONDS, check=True)
    os.close(its)
    shown = ""
    # Linux ends it with an error.
    with contextlib.suppress(OSError):
        while read := os.read(ours, 65536):
            shown += read.decode()
    os.close(ours)

    assert f"{len(ROWS)}/{len(ROWS)}" in shown
    assert f"/{len(ROWS)}" not in run("--store", store).stderr.decode()


def test_memory_does_not_grow_with_what_is_exported(large: Path, kind: str) -> None:
    def kibibytes(*options: str) -> int:
        command = [sys.executable, "-c", MEASURED, "--store", large, "--format", kind, "-o", "/dev/null", *options]
        return int(
            subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True, timeout=SECONDS).stdout
        )

    half = kibibytes("--until", "2026-09-21T14:16:00Z")
    everything = kibibytes()

    # 160 generations, and 320 of 200 kB each; an allocator alone differs by a quarter of that from run to run.
    assert everything - half < 160 * 200 / 2


def test_without_pyarrow_the_install_command_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError\n")

    result = run(
        "--store",
        store,
        "--format",
        "parquet",
        "-o",
        tmp_path / "out",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )

    assert (result.returncode, result.stdout) == (1, b"")
    said = r"agl export: Parquet needs pyarrow: \S+/python\S* -m pip install pyarrow\n"
    assert re.fullmatch(said, result.stderr.decode())
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    reason = f"cannot be opened: {os.strerror(errno.ENOENT)}: check the path"
    assert refused("--store", tmp_path / "typo.db").startswith(f"{tmp_path}/typo.db {reason}")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_as_the_store_is_refused_with_a_path_in_it(tmp_path: Path) -> None:
    advice = f"is a folder: give the path of a file in it, such as {tmp_path}/run.db"
    assert refused("--store", tmp_path) == f"{tmp_path} {advice}"


def test_a_store_in_a_missing_folder_is_refused_with_the_folder(tmp_path: Path) -> None:
    reason = f"cannot be opened: {os.strerror(errno.ENOENT)}, since there is no folder {tmp_path}/missing: create"
    assert refused("--store", tmp_path / "missing/a.db").startswith(f"{tmp_path}/missing/a.db {reason}")


def test_a_file_in_a_missing_folder_is_refused_with_the_folder(store: Path) -> None:
    assert refused("--store", store, "-o", "/nowhere/out") == (
        "there is no folder /nowhere: create it, or give another -o"
    )


def test_a_folder_as_the_file_is_refused_with_a_path_in_it(store: Path, tmp_path: Path) -> None:
    assert refused("--store", store, "-o", tmp_path) == (
        f"{tmp_path} is a folder: give -o a file in it, such as {tmp_path}/export"
    )


def test_a_file_that_cannot_be_written_is_named_with_the_reason(store: Path) -> None:
    # Every write to it fails.
    assert refused("--store", store, "-o", "/dev/full") == f"cannot write /dev/full: {os.strerror(errno.ENOSPC)}"


def test_a_file_that_exists_is_replaced_by_force_alone(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("before")

    assert refused("--store", store, "-o", file) == f"{file} exists: give --force to replace it, or another -o"
    assert file.read_text() == "before"
    assert run("--store", store, "-o", file, "--force").returncode == 0
    assert len(file.read_bytes().splitlines()) == len(ROWS)


def test_parquet_to_a_terminal_is_refused(store: Path) -> None:
    shown, status = on_terminal([*EXPORT, "--store", str(store), "--format", "parquet"])

    assert status == 2
    assert shown.splitlines() == [
        "agl export: Parquet is binary, which a terminal cannot show: give -o FILE",
        "see agl export --help",
    ]


NOTHING_MATCHES = {
    ("--rollout", "nobody"): (
        "0 generations match --rollout nobody; the store has 25 generations; the first rollouts there are rollout-0, "
        "rollout-1, rollout-2"
    ),
    ("--rollout", "rollout-0", "--session", "none"): (
        "0 generations match --rollout rollout-0 --session none; the store has 25 generations, of which 9 match "
        "--rollout rollout-0 and 0 match --session none; the first sessions there are a session"
    ),
    ("--since", "2030-01-01T00:00:00Z"): (
        "0 generations match --since 2030-01-01T00:00:00+00:00; the store has 25 generations; the first finished at "
        "2026-09-21T14:13:20+00:00"
    ),
    ("--what", "triplets", "--rollout", "rollout-1", "--attempt", "b"): (
        "0 triplets match --rollout rollout-1 --attempt b; the store has 25 generations, of which 10 match "
        "--rollout rollout-1 and 0 match --attempt b; the first attempts there are attempt-1"
    ),
}


@pytest.mark.parametrize(("options", "said"), NOTHING_MATCHES.items(), ids=range(len(NOTHING_MATCHES)))
def test_nothing_that_matches_makes_an_empty_file_and_says_what_is_there(
    store: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = run("--store", store, "-o", tmp_path / "out", *options, TZ="UTC")

    assert (result.returncode, result.stdout, result.stderr.decode()) == (0, b"", f"agl export: {said}\n")
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "which store? Give --store, or set AGL_STORE"),
        (("--store", "a.db", "--format", "csv"), "csv"),
        (("--store", "a.db", "--since", "yesterday"), "'yesterday' is not a time; write it like 2026-11-24T10:30"),
        (("--store", "a.db", "--since", "1790000000"), "'1790000000' is not a time; write it like 2026-11-24T10:30"),
        (("--store", "a.db", "--until=-5"), "'-5' is not a time; write it like 2026-11-24T10:30"),
        (("--store", "a.db", "--status", "asleep"), "asleep"),
        (("--store", "a.db", "--what", "spans"), "spans"),
        (
            ("--store", "a.db", "--what", "triplets", "--session", "s", "--until", "2026-11-24"),
            "triplets cannot be filtered by --session, --until",
        ),
    ],
)
def test_options_that_contradict_each_other_exit_with_status_2(options: tuple[str, ...], reason: str) -> None:
    assert reason in refused(*options, status=2)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_tells_the_options(option: str) -> None:
    result = run(option, AGL_STORE="postgresql://me:secret@host/db")

    assert (result.returncode, result.stderr) == (0, b"")
    said = result.stdout.decode()
    assert said.startswith("usage: agl export ")
    assert all(
        name in said for name in ("--store", "--what", "--format", "--rollout", "--attempt", "--since", "AGL_STORE")
    )
    assert "secret" not in said
