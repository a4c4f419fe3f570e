"""File formats of generations, triplets and trajectories: JSON Lines and Parquet."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from agentlightning.generation import (
    VERSION,
    Choice,
    Generation,
    RoutedExperts,
    SamplingMask,
    TopLogprobs,
    named,
    record_fields,
)
from agentlightning.trajectory import SAMPLING, Trajectory
from agentlightning.triplet import Triplet

__all__ = [
    "GENERATIONS",
    "TRAJECTORIES",
    "TRIPLETS",
    "Kind",
    "MissingPackage",
    "import_pyarrow",
    "write_jsonl",
    "write_parquet",
]

ROWS_AT_ONCE = 16
# A routed expert is an element of nested lists until it is in a batch: these are some 100 MB.
VALUES_AT_ONCE = 4 << 20
ROW_GROUP_BYTES = 16 << 20
# Sampling parameters that are lists or objects.
OF_ANY_SHAPE = ("logit_bias", "allowed_token_ids", "bad_words")


class MissingPackage(Exception):
    """A format needs a package that is not installed; the message says how to install it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of record.

    Attributes:
        row: converts a record to a row. All rows have one shape, since readers infer it from the first.
        schema: makes the schema of a Parquet file, with a row's fields in their order, from the module `pyarrow`.
    """

    row: Callable[[Any], dict[str, Any]]
    schema: Callable[[Any], Any]


def write_jsonl(file: IO[bytes], records: Iterator[Any], kind: Kind) -> int:
    """Write one line for each record; return how many."""
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007
        row = kind.row(record)
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            # JSON cannot express infinity.
            line = json.dumps(_finite(row))
        file.write(f"{line}\n".encode())
    return count


def import_pyarrow() -> tuple[Any, Any]:
    """Import pyarrow; return the module, and its writer of Parquet.

    Raises:
        MissingPackage: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise MissingPackage(f"Parquet needs pyarrow: {sys.executable} -m pip install pyarrow") from error
    return pyarrow, ParquetWriter


def write_parquet(file: IO[bytes], records: Iterator[Any], kind: Kind) -> int:
    """Write one row for each record; return how many.

    Raises:
        MissingPackage: pyarrow is not installed.
    """
    pyarrow, writer_class = import_pyarrow()
    count = 0
    schema = kind.schema(pyarrow)
    with writer_class(file, schema, compression="zstd") as writer:
        group: list[Any] = []
        while rows := _some(records, kind):
            count += len(rows)
            group.append(pyarrow.RecordBatch.from_pylist(rows, schema))
            if sum(batch.nbytes for batch in group) >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_batches(group))
                group = []
        writer.write_table(pyarrow.Table.from_batches(group, schema))
    return count


def _some(records: Iterator[Any], kind: Kind) -> list[dict[str, Any]]:
    """Convert the next records to rows: as many as are in memory at once."""
    rows: list[dict[str, Any]] = []
    values = 0
    for record in islice(records, ROWS_AT_ONCE):
        rows.append(kind.row(record))
        values += _values_in(record)
        if values >= VALUES_AT_ONCE:
            break
    return rows


def _values_in(record: Any) -> int:
    """Count the routed experts of a record, and the ids in its mask: it may have many times as many of them as ids."""
    holders = record.choices if isinstance(record, Generation) else [record]
    known = (getattr(each, name) for each in holders for name in ("routed_experts", "sampling_mask"))
    return sum(len(each.ids) for each in known if each is not None)


def _finite(value: Any) -> Any:
    """Replace infinities in JSON data by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def _generation_row(generation: Generation) -> dict[str, Any]:
    row = generation.as_dict()
    for choice in row["choices"]:
        if choice["stop_reason"] is not None:
            choice["stop_reason"] = str(choice["stop_reason"])
        if choice["weight_versions"] is not None:
            choice["weight_versions"] = named(VERSION, choice["weight_versions"])
    return row


def _generation_schema(pyarrow: Any) -> Any:
    choice = pyarrow.struct(_columns(pyarrow, Choice, index=pyarrow.int32()))
    return pyarrow.schema(_columns(pyarrow, Generation, choices=pyarrow.list_(choice)))


def _columns(pyarrow: Any, kind: type, **others: Any) -> dict[str, Any]:
    """Derive the columns of a record from its fields. A field of any other type is a text."""
    int32, float32 = pyarrow.int32(), pyarrow.float32()
    ids = pyarrow.list_(int32)
    version = dict(zip(VERSION, (pyarrow.string(), int32, int32), strict=True))
    types = {
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        list[int]: ids,
        list[float]: pyarrow.list_(float32),
        list[tuple[str, int, int]]: pyarrow.list_(pyarrow.struct(version)),
        RoutedExperts: pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.int16()))),
        SamplingMask: pyarrow.list_(ids),
        TopLogprobs: pyarrow.list_(pyarrow.list_(pyarrow.struct({"id": int32, "logprob": float32}))),
    }
    return {each.name: others.get(each.name, types.get(each.type, pyarrow.string())) for each in record_fields(kind)}


def _triplet_row(triplet: Triplet) -> dict[str, Any]:
    return _with_json_texts(triplet.as_dict())


def _trajectory_row(trajectory: Trajectory) -> dict[str, Any]:
    row = trajectory.as_dict()
    for span in row["spans"]:
        if span["sampling"] is not None:
            _as_json_texts(span["sampling"], OF_ANY_SHAPE)
    return _with_json_texts(row)


def _with_json_texts(row: dict[str, Any]) -> dict[str, Any]:
    """Write what may have any shape as JSON, so that all rows have one shape."""
    _as_json_texts(row, ("input", "metadata"))
    return row


def _as_json_texts(row: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if row[name] is not None:
            row[name] = json.dumps(row[name], ensure_ascii=False)


def _trajectory_schema(pyarrow: Any) -> Any:
    text, int32, float64 = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    sampling = pyarrow.struct({name: text if name in OF_ANY_SHAPE else float64 for name in SAMPLING})
    call = {"generation_id": text, "index": int32}
    span = {
        **call,
        "start": int32,
        "end": int32,
        "is_trained": pyarrow.bool_(),
        **dict.fromkeys(("status", "finish_reason"), text),
        "reward": float64,
        "logprobs_mode": text,
        "sampling": sampling,
    }
    others = {
        **dict.fromkeys(("index", "count", "prompt_length", "missing_experts"), int32),
        "parent": pyarrow.struct({"index": int32, "position": int32}),
        "response_mask": pyarrow.list_(pyarrow.int8()),
        "spans": pyarrow.list_(pyarrow.struct(span)),
        "rewards": pyarrow.list_(pyarrow.struct({"position": int32, "reward": float64})),
        "flags": pyarrow.list_(text),
        "left_out": pyarrow.list_(pyarrow.struct({**call, "reason": text, "reward": float64})),
    }
    return pyarrow.schema(_columns(pyarrow, Trajectory, **others))


def _triplet_schema(pyarrow: Any) -> Any:
    return pyarrow.schema(_columns(pyarrow, Triplet, index=pyarrow.int32()))


GENERATIONS = Kind(_generation_row, _generation_schema)
TRIPLETS = Kind(_triplet_row, _triplet_schema)
TRAJECTORIES = Kind(_trajectory_row, _trajectory_schema)
