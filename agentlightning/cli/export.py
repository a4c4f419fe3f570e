"""`agl export`: what is in a store, as JSONL or Parquet."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import agentlightning
from agentlightning import settings
from agentlightning.generation import STATUSES, Generation
from agentlightning.store import Filters, StoreRefused, StoreUnavailable, open_store

DESCRIPTION = "Write recorded generations to a file, in the order in which they finished."
EPILOG = """\
Moments are ISO 8601, in local time where they name no other: 2026-11-24, 2026-11-24T10:30, 2026-11-24T10:30:00Z.
FILE appears when it is complete, and can be read by its owner alone."""

INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE
ROWS_AT_ONCE = 16
ROW_GROUP_BYTES = 16 << 20
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Stopped(Exception):
    """Nothing more can be done; the message is one sentence that says why."""


def main(arguments: Sequence[str]) -> int:
    """Run `agl export`; returns the exit status."""
    options = _parser().parse_args(arguments)
    filters: Any = {
        name: value for name in Filters.__annotations__ if (value := getattr(options, name, None)) is not None
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        write = _write_parquet if options.format == "parquet" else _write_jsonl
        with open_store(options.store, create=False) as store, _output(options.output) as file:
            total = sum(store.tally(**filters).values())
            # None: not where stderr is no terminal.
            with tqdm(store.generations(**filters), total=total, unit=" generations", disable=None) as generations:
                write(file, iter(generations))
    except BrokenPipeError:
        # Python would try again, and complain, when it closes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Stopped, StoreRefused, StoreUnavailable, OSError) as reason:
        sys.stderr.write(f"agl export: {reason}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agl export", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    store = settings.read("AGL_STORE")
    parser.add_argument("--store", metavar="URL", default=store, required=not store, help="AGL_STORE if not given")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="jsonl if not given")
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="- is stdout, also if not given")
    parser.add_argument("--rollout", metavar="ID", dest="rollout_id", help="only this rollout's")
    parser.add_argument("--attempt", metavar="ID", dest="attempt_id", help="only this attempt's")
    parser.add_argument("--session", metavar="ID", dest="session_id", help="only this session's")
    parser.add_argument("--model", metavar="NAME", help="only this model's")
    parser.add_argument("--status", choices=STATUSES, help="only those that ended like this")
    parser.add_argument("--since", metavar="MOMENT", type=_moment, help="only those that finished then or later")
    parser.add_argument("--until", metavar="MOMENT", type=_moment, help="only those that finished before")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


def _moment(text: str) -> int:
    """Nanoseconds since the epoch."""
    try:
        # Python before 3.11 does not know Z.
        moment = datetime.fromisoformat(text.removesuffix("Z") + ("+00:00" if text.endswith("Z") else ""))
        return (moment.astimezone() - EPOCH) // timedelta(microseconds=1) * 1_000
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no moment, such as 2026-11-24T10:30") from error


@contextmanager
def _output(name: str) -> Iterator[IO[bytes]]:
    """Where to write to: a file takes its name, and the place of one that had it before, when the block is through."""
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        # A pipe or a device: nothing that could be replaced.
        with path.open("wb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def _row(generation: Generation) -> dict[str, Any]:
    """What is written of a generation: of one shape, whatever is in it, since readers take the first for all."""
    row = generation.as_dict()
    for choice in row["choices"]:
        if choice["stop_reason"] is not None:
            choice["stop_reason"] = str(choice["stop_reason"])
        if choice["weight_versions"] is not None:
            names = ("version", "start", "end")
            choice["weight_versions"] = [dict(zip(names, span, strict=True)) for span in choice["weight_versions"]]
    return row


def _write_jsonl(file: IO[bytes], generations: Iterator[Generation]) -> None:
    for generation in generations:
        row = _row(generation)
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            # JSON has no infinity.
            for choice in row["choices"]:
                if choice["logprobs"] is not None:
                    choice["logprobs"] = [each if math.isfinite(each) else None for each in choice["logprobs"]]
            line = json.dumps(row)
        file.write(f"{line}\n".encode())


def _write_parquet(file: IO[bytes], generations: Iterator[Generation]) -> None:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise Stopped(f"Parquet needs pyarrow: {sys.executable} -m pip install pyarrow") from error
    schema = _schema(pyarrow)
    with ParquetWriter(file, schema, compression="zstd") as writer:
        group: list[Any] = []
        while rows := [_row(generation) for generation in islice(generations, ROWS_AT_ONCE)]:
            group.append(pyarrow.RecordBatch.from_pylist(rows, schema))
            if sum(batch.nbytes for batch in group) >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_batches(group))
                group = []
        writer.write_table(pyarrow.Table.from_batches(group, schema))


def _schema(pyarrow: Any) -> Any:
    """The Parquet file's: the fields of `Generation`, in its order."""
    text, int32, int64 = pyarrow.string(), pyarrow.int32(), pyarrow.int64()
    ids = pyarrow.list_(int32)
    span = pyarrow.struct({"version": text, "start": int32, "end": int32})
    choice = pyarrow.struct(
        {
            "index": int32,
            "token_ids": ids,
            "logprobs": pyarrow.list_(pyarrow.float32()),
            "text": text,
            "finish_reason": text,
            "stop_reason": text,
            "weight_versions": pyarrow.list_(span),
            "routed_experts": pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.int16()))),
        }
    )
    others = {
        **dict.fromkeys(("started_at", "first_token_at", "finished_at"), int64),
        "prompt_token_ids": ids,
        "cached_tokens": int32,
        "choices": pyarrow.list_(choice),
    }
    return pyarrow.schema({name: others.get(name, text) for name in Generation.__slots__})
