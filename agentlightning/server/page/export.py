"""Exports of the rollouts that a list shows: their rows, their triplets, their trajectories."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

from fastapi import Response
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict

from agentlightning.server.answers import encode
from agentlightning.server.page.rollout_table import TableQuery
from agentlightning.server.routes.lines import JSON_LINES, lines_of_each
from agentlightning.server.routes.trajectories import trajectory_lines
from agentlightning.server.routes.triplets import triplet_lines
from agentlightning.server.transactions import Transactions
from agentlightning.store import rollout_list
from agentlightning.store.summaries import Summary

__all__ = ["EXPORTS", "ExportQuery", "export"]

ExportForm = Literal["jsonl", "parquet", "triplets", "trajectories"]
EXPORTS: Mapping[ExportForm, str] = {
    "jsonl": "Rollouts as JSON Lines",
    **({"parquet": "Rollouts as Parquet"} if find_spec("pyarrow") else {}),
    "triplets": "Triplets as JSON Lines",
    "trajectories": "Trajectories as JSON Lines",
}
"""Formats that are offered; Parquet where pyarrow is installed."""
ROWS_AT_ONCE = 500
PARQUET = "application/vnd.apache.parquet"


class ExportQuery(TableQuery):
    """The query parameters of an export: those of the table, and what is written.

    Any other is refused: a misspelt filter would export everything.
    """

    model_config = ConfigDict(extra="forbid")

    format: ExportForm = "jsonl"


async def export(database: Transactions, query: ExportQuery) -> Response:
    """Answer with a file of all rollouts that match, in the order of the list, whatever its page.

    Rows, triplets and trajectories are read and sent part by part; a Parquet file is in memory until it is whole.
    """
    form, (wanted, _) = query.format, query.read()
    rollout_ids = await database.read(lambda connection: rollout_list.rollout_ids(connection, wanted))
    name = (
        f"{form if form in ('triplets', 'trajectories') else 'rollouts'}.{'parquet' if form == 'parquet' else 'jsonl'}"
    )
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    if form == "parquet":
        rows = [row async for part in _rows(database, rollout_ids) for row in part]
        return Response(await database.run(partial(_parquet, rows)), media_type=PARQUET, headers=headers)
    if form == "jsonl":
        lines = _lines(database, rollout_ids)
    else:
        of_rollout = triplet_lines if form == "triplets" else trajectory_lines
        lines = lines_of_each(rollout_ids, partial(of_rollout, database))
    return StreamingResponse(lines, media_type=JSON_LINES, headers=headers)


async def _lines(database: Transactions, rollout_ids: Sequence[str]) -> AsyncIterator[bytes]:
    async for rows in _rows(database, rollout_ids):
        yield b"".join(encode(row) + b"\n" for row in rows)


async def _rows(database: Transactions, rollout_ids: Sequence[str]) -> AsyncIterator[list[dict[str, Any]]]:
    for start in range(0, len(rollout_ids), ROWS_AT_ONCE):
        some = rollout_ids[start : start + ROWS_AT_ONCE]
        found = await database.read(lambda connection, some=some: rollout_list.summaries_of(connection, some))
        yield [_row(each) for each in found]


def _row(found: Summary) -> dict[str, Any]:
    row = {each.name: getattr(found, each.name) for each in fields(Summary) if each.name != "since"}
    return {**row, "tags": found.tags.split("\n")[1:-1]}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    # Imported here: the package is installed only where somebody wants it, and takes long to import.
    import pyarrow
    from pyarrow import parquet

    types = {"int": pyarrow.int64(), "float": pyarrow.float64(), "str": pyarrow.string()}
    schema = pyarrow.schema(
        (each.name, pyarrow.list_(pyarrow.string()) if each.name == "tags" else types[cast(str, each.type).split()[0]])
        for each in fields(Summary)
        if each.name != "since"
    )
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), file)
    return file.getvalue()
