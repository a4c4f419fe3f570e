"""File formats of generations and triplets: JSON Lines and Parquet."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from agentlightning.generation import Generation
from agentlightning.triplet import VERSION, Triplet

__all__ = ["GENERATIONS", "TRIPLETS", "Kind", "MissingPackage", "import_pyarrow", "write_jsonl", "write_parquet"]

ROWS_AT_ONCE = 16
ROW_GROUP_BYTES = 16 << 20


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
        while rows := [kind.row(record) for record in islice(records, ROWS_AT_ONCE)]:
            count += len(rows)
            group.append(pyarrow.RecordBatch.from_pylist(rows, schema))
            if sum(batch.nbytes for batch in group) >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_batches(group))
                group = []
        writer.write_table(pyarrow.Table.from_batches(group, schema))
    return count


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
            choice["weight_versions"] = [dict(zip(VERSION, span, strict=True)) for span in choice["weight_versions"]]
    return row


def _generation_schema(pyarrow: Any) -> Any:
    text, int32, int64 = pyarrow.string(), pyarrow.int32(), pyarrow.int64()
    ids = pyarrow.list_(int32)
    choice = pyarrow.struct(
        {
            "index": int32,
            "token_ids": ids,
            "logprobs": pyarrow.list_(pyarrow.float32()),
            "text": text,
            "finish_reason": text,
            "stop_reason": text,
            "weight_versions": _versions(pyarrow),
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


def _triplet_schema(pyarrow: Any) -> Any:
    ids = pyarrow.list_(pyarrow.int32())
    others = {
        "index": pyarrow.int32(),
        "prompt_token_ids": ids,
        "response_token_ids": ids,
        "logprobs": pyarrow.list_(pyarrow.float32()),
        "reward": pyarrow.float64(),
        "weight_versions": _versions(pyarrow),
    }
    return pyarrow.schema({name: others.get(name, pyarrow.string()) for name in Triplet.__slots__})


def _versions(pyarrow: Any) -> Any:
    return pyarrow.list_(pyarrow.struct(dict(zip(VERSION, (pyarrow.string(), *[pyarrow.int32()] * 2), strict=True))))


GENERATIONS = Kind(_generation_row, _generation_schema)
TRIPLETS = Kind(Triplet.as_dict, _triplet_schema)
