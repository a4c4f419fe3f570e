"""`agl export -o s3://…`: to a real server of that protocol, moto's, in an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow.parquet
import pytest
from pyarrow import fs

from agentlightning.cli import export
from agentlightning.generation import Choice
from agentlightning.store import open_store
from tests.common.environments import run, virtual_environment
from tests.common.generations import generation
from tests.common.vllm import SCRIPTS

pytestmark = pytest.mark.tier("all")

MOTO = "moto[server]==5.2.5"
SECONDS = 120


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that speaks S3."""
    environment = virtual_environment(tmp_path_factory.mktemp("moto") / "environment")
    # Not with the versions of the tests' environment, whose botocore is another one.
    unconstrained = {"UV_CONSTRAINT": "", "UV_BUILD_CONSTRAINT": ""}
    uv = (SCRIPTS / "uv", "pip", "install", "--quiet", "--python", environment.python)
    run(*uv, MOTO, **unconstrained)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [environment.scripts / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until_it_answers(url)
            yield url
        finally:
            process.terminate()


def until_it_answers(url: str) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            with urlopen(url):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty bucket, on the server that the environment names."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    with urlopen(Request(f"{endpoint}/{name}", method="PUT")):
        return name


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    with open_store(str(path)) as store:
        store.add(
            [
                generation(number, choices=[Choice(token_ids=array("i", [number]), finish_reason="stop")])
                for number in range(30)
            ]
        )
    return path


def exported(store: Path, *options: str) -> int:
    return export.main(["--store", str(store), "--what", "trajectories", *options])


def objects(bucket: str) -> dict[str, Any]:
    """The objects of a bucket by their names."""
    filesystem, _ = fs.FileSystem.from_uri(f"s3://{bucket}/any")
    found = filesystem.get_file_info(fs.FileSelector(bucket, recursive=True))
    return {each.path: filesystem.open_input_file(each.path) for each in found if each.type == fs.FileType.File}


def test_an_object_has_the_rows(store: Path, bucket: str) -> None:
    assert exported(store, "--format", "parquet", "-o", f"s3://{bucket}/runs/one.parquet") == 0
    assert exported(store, "-o", f"s3://{bucket}/runs/one.jsonl") == 0

    found = objects(bucket)
    rows = [json.loads(line) for line in found[f"{bucket}/runs/one.jsonl"].read().splitlines()]
    assert len(rows) > 3
    assert pyarrow.parquet.read_table(found[f"{bucket}/runs/one.parquet"]).to_pylist() == rows


def test_a_long_export_is_written_in_parts_once(store: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"s3://{bucket}/run/"

    assert exported(store, "--rows-per-file", "16", "-o", folder) == 0
    assert sorted(objects(bucket)) == [f"{bucket}/run/part-00000.jsonl", f"{bucket}/run/part-00001.jsonl"]
    capsys.readouterr()
    assert exported(store, "--rows-per-file", "16", "-o", folder) == 1
    assert "has files already" in capsys.readouterr().err


def test_a_failed_export_leaves_no_object(
    store: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setitem(export.WRITERS, "jsonl", fail)
    assert exported(store, "-o", f"s3://{bucket}/half.jsonl") == 1
    assert "the disk is gone" in capsys.readouterr().err
    assert objects(bucket) == {}


def test_a_bucket_that_is_not_there_is_named(store: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(store, "-o", "s3://nowhere-at-all/rows.jsonl") == 1

    error = capsys.readouterr().err
    assert error.startswith("agl export: s3://nowhere-at-all/rows.jsonl cannot be written: ")
    assert "no bucket nowhere-at-all" in error


def test_an_object_is_replaced_only_by_force(store: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"s3://{bucket}/rows.jsonl"
    assert exported(store, "-o", url) == 0
    capsys.readouterr()

    assert exported(store, "-o", url) == 1
    assert f"{url} exists: give --force to replace it" in capsys.readouterr().err
    assert exported(store, "--force", "-o", url) == 0


def test_parts_are_written_where_the_url_has_options(store: Path, bucket: str) -> None:
    assert exported(store, "--rows-per-file", "16", "-o", f"s3://{bucket}/run?region=us-east-1") == 0

    assert sorted(objects(bucket)) == [f"{bucket}/run/part-00000.jsonl", f"{bucket}/run/part-00001.jsonl"]
