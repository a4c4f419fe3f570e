"""Spans, one at a time, and found again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
from fastapi import Query, Request, Response
from sqlalchemy import ColumnElement, Connection, false, select

from agentlightning.server.answers import Json, encode, page, span
from agentlightning.server.decoding import repair_json, without_nan
from agentlightning.server.errors import sentence
from agentlightning.server.models import spans as models
from agentlightning.server.models.common import Page
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.store import attributes, rollouts, spans, triplets
from agentlightning.store.pages import contains, matching
from agentlightning.store.rows import text_of
from agentlightning.store.tables import spans as table
from agentlightning.store.tables import texts
from agentlightning.triplet import Triplet

__all__ = ["routes"]

SEARCHED = ("trace_id", "span_id", "parent_id", "name")
LOGPROBS = "logprobs.content"

parts = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

routes = router("spans", mend=lambda body: without_nan(repair_json(body)))

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Span"}}},
    }
}


@routes.post("/spans", status_code=201, response_model=models.Span | None, responses=errors(404), openapi_extra=BODY)
async def add_span(request: Request, database: Database) -> Response:
    """Keep a span of an attempt, which is a sign of life of it; null where it was kept before."""
    sent = await request.json()
    # Checked, and kept as it was sent: the ids in it may be thousands.
    checked = models.Span.model_validate(sent)
    # Some send no text, or zeros, for none.
    parent_id = checked.parent_id if checked.parent_id and checked.parent_id.strip("0") else None
    apart = ("rollout_id", "attempt_id", "sequence_id", "resource")
    body = {name: value for name, value in sent.items() if name not in apart}
    new = spans.NewSpan(
        rollout_id=checked.rollout_id,
        attempt_id=checked.attempt_id,
        sequence_id=checked.sequence_id,
        trace_id=checked.trace_id,
        span_id=checked.span_id,
        parent_id=parent_id,
        name=checked.name,
        start_time=checked.start_time,
        end_time=checked.end_time,
        response_id=attributes.response_id(checked.attributes),
        reward=attributes.reward(checked.name, checked.attributes),
        body=encode(body),
        common=encode({"resource": sent["resource"]}),
    )

    def work(connection: Connection) -> int:
        if not rollouts.heard_of(connection, checked.rollout_id, checked.attempt_id):
            raise rollouts.Unknown(f"there is no attempt {checked.attempt_id!r} of a rollout {checked.rollout_id!r}")
        return spans.add(connection, [new])

    return Json(span(new) if await database.write(work) else None, 201)


@routes.get("/spans", response_model=Page[models.KeptSpan], responses=errors())
async def query_spans(asked: Annotated[models.QuerySpans, Query()], database: Database) -> Response:
    """Find spans of a rollout, or of a trace: those that came without a rollout too."""
    return await _page(asked, database)


@routes.post("/spans/search", response_model=Page[models.KeptSpan], responses=errors())
async def search_spans(asked: models.QuerySpans, database: Database) -> Response:
    """Find spans of a rollout, or of a trace: those that came without a rollout too."""
    return await _page(asked, database)


@routes.post("/spans/next", response_model=models.SequenceId, responses=errors())
async def get_next_sequence_id(asked: models.NextSequenceId, database: Database) -> Response:
    """A number for a span of a rollout, higher than those of all its others."""
    [number] = await database.write(lambda connection: spans.next_sequence_ids(connection, asked.rollout_id))
    return Json({"sequence_id": number})


async def _page(asked: models.QuerySpans, database: Database) -> Response:
    if asked.rollout_id is None and asked.trace_id is None:
        return sentence(422, "rollout_id: is required, or trace_id in its place")

    def where(connection: Connection) -> ColumnElement[bool]:
        must, may = [], []
        if asked.rollout_id is None:
            must.append(table.c.trace_id == asked.trace_id)
        else:
            must.append(table.c.rollout_id == asked.rollout_id)
        attempt_id = asked.attempt_id
        if attempt_id == "latest":
            found = rollouts.find(connection, asked.rollout_id or "")
            attempt_id = None if found is None else found.attempt_id
            if attempt_id is None:
                must.append(false())
        if attempt_id is not None:
            must.append(table.c.attempt_id == attempt_id)
        for name in SEARCHED:
            if (wanted := getattr(asked, name)) is not None:
                may.append(table.c[name] == wanted)
            if (part := getattr(asked, f"{name}_contains")) is not None:
                may.append(contains(table.c[name], part))
        return matching([*must, matching(may, asked.filter_logic)], "and")

    columns = ("key", "rollout_id", "attempt_id", "sequence_id", "response_id", "body")
    query = select(*(table.c[name] for name in columns), texts.c.text.label("common")).select_from(
        table.outerjoin(texts, texts.c.key == table.c.common_key)
    )
    return await page(database, asked, where, query, table.c.key, span, _with_captured_ids)


def _with_captured_ids(connection: Connection, rows: list[Any]) -> list[Any]:
    """Spans that name an answer that is known get its ids, where they have come without."""
    named = {text_of(row.response_id) for row in rows if row.response_id is not None}
    captured = triplets.of_responses(connection, named) if named else {}
    return [_with_ids(row, captured.get(text_of(row.response_id))) for row in rows] if captured else rows


def _with_ids(row: Any, captured: Triplet | None) -> Any:
    if captured is None:
        return row
    body = parts(row.body)
    known = parts(body["attributes"])
    # As the tracer of 0.3 writes them, and its adapters read them.
    new: dict[str, Any] = {}
    for name in ("prompt_token_ids", "response_token_ids"):
        if name not in known and (ids := getattr(captured, name)) is not None:
            new[name] = ids.tolist()
    if LOGPROBS not in known and captured.logprobs is not None:
        new[LOGPROBS] = encode([{"logprob": each} for each in captured.logprobs.tolist()]).decode()
    return SimpleNamespace(**{**row._mapping, "body": encode({**body, "attributes": {**known, **new}})})
