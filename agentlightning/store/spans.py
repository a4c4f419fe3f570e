"""Spans: stored as they arrived, found by rollout or by trace. The caller owns the transaction.

A span's body may hold thousands of token ids, so it is not parsed where that can be avoided.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, false, func, select

from agentlightning.store import attributes, rollouts, tables, texts, triplets
from agentlightning.store.database import found, in_parts, insert_rows, run_many
from agentlightning.store.documents import to_json
from agentlightning.store.pages import Listing, Logic, contains, matching
from agentlightning.store.rows import storable, text_of
from agentlightning.store.tables import ATTEMPT_OF_SPAN, span_sequences, spans
from agentlightning.triplet import Triplet

__all__ = ["NewSpan", "add", "listing", "new_span", "next_sequence_ids", "outlines", "place_again", "span_json"]

SEARCHED = ("trace_id", "span_id", "parent_id", "name")
LOGPROBS = "logprobs.content"

_MORE = """
    INSERT INTO span_sequences VALUES (?, ?)
    ON CONFLICT (rollout_id) DO UPDATE SET last = span_sequences.last + excluded.last
"""
_AT_LEAST = """
    INSERT INTO span_sequences VALUES (?, ?) ON CONFLICT (rollout_id) DO UPDATE SET last =
    CASE WHEN span_sequences.last < excluded.last THEN excluded.last ELSE span_sequences.last END
"""


@dataclass(slots=True)
class NewSpan:
    """A span that is to be stored.

    Attributes:
        rollout_id: None, as `attempt_id`, for a span that arrived without a rollout.
        sequence_id: position in the rollout, if the sender gave one; None for the next.
        start_time: seconds since the epoch, as `end_time`.
        response_id: id of the model's answer that the span is about; see `attributes.response_id`.
        reward: see `attributes.reward`.
        body: JSON object of all fields but `rollout_id`, `attempt_id`, `sequence_id` and those in `common`.
        common: JSON object of fields that many spans share, which are stored once: `resource` and `scope`.
    """

    rollout_id: str | None
    attempt_id: str | None
    sequence_id: int | None
    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_time: float | None
    end_time: float | None
    response_id: str | None
    reward: float | None
    body: bytes
    common: bytes | None = None


def new_span(
    fields: Mapping[str, Any], encode: Callable[[Any], bytes] = lambda value: to_json(value).encode()
) -> NewSpan:
    """Prepare a span, given as a JSON object with the fields of `agentlightning.rollout_records.Span`, for storing.

    Args:
        encode: serializes JSON.
    """
    parent_id = fields["parent_id"]
    apart = ("rollout_id", "attempt_id", "sequence_id", "resource")
    return NewSpan(
        rollout_id=fields["rollout_id"],
        attempt_id=fields["attempt_id"],
        sequence_id=fields["sequence_id"],
        trace_id=fields["trace_id"],
        span_id=fields["span_id"],
        # Some exporters send an empty text, or zeros, for a root.
        parent_id=parent_id if parent_id and parent_id.strip("0") else None,
        name=fields["name"],
        start_time=fields["start_time"],
        end_time=fields["end_time"],
        response_id=attributes.response_id(fields["attributes"]),
        reward=attributes.reward(fields["name"], fields["attributes"]),
        body=encode({name: value for name, value in fields.items() if name not in apart}),
        common=encode({"resource": fields["resource"]}),
    )


def add(connection: Connection, new: Sequence[NewSpan]) -> int:
    """Store spans; returns how many are new. One whose span_id its attempt, or its trace, has is left unchanged.

    Each span without a `sequence_id` gets one, so a transaction that is run again must begin with fresh spans.
    """
    wanted = Counter(each.rollout_id for each in new if each.rollout_id is not None and each.sequence_id is None)
    given = {rollout_id: iter(ids) for rollout_id, ids in _reserve(connection, wanted).items()}
    keys = texts.keys_of(connection, {_text(each.common) for each in new})
    are_numbered = [each.rollout_id is not None and each.sequence_id is not None for each in new]
    highest: dict[str, int] = {}
    for each in new:
        if each.rollout_id is None:
            each.sequence_id = 0
        elif each.sequence_id is None:
            each.sequence_id = next(given[each.rollout_id])
        else:
            highest[each.rollout_id] = max(each.sequence_id, highest.get(each.rollout_id, 0))
    # Sorted: each locks the row of its rollout, and two writers of the same rollouts must lock in the same order.
    run_many(connection, _AT_LEAST, sorted(highest.items()))
    values = [
        (
            each.rollout_id,
            each.attempt_id,
            each.sequence_id,
            _column(each.trace_id),
            _column(each.span_id),
            None if each.parent_id is None else _column(each.parent_id),
            _column(each.name),
            each.start_time,
            each.end_time,
            is_numbered,
            storable(each.response_id),
            each.reward,
            keys[_text(each.common)],
            each.body,
        )
        for each, is_numbered in zip(new, are_numbered, strict=True)
    ]
    return insert_rows(connection, spans, values, without="key", if_new=True)


def place_again(connection: Connection, new: Sequence[NewSpan]) -> None:
    """Give spans that name a rollout and no attempt the attempt under which they are stored already, if they are.

    Otherwise a span that is sent again after another attempt has begun would be stored for that one, too.
    """
    unplaced = {(each.trace_id, each.span_id): each for each in new if each.rollout_id and not each.attempt_id}
    for some in in_parts(list(unplaced)):
        query = select(spans.c.trace_id, spans.c.span_id, spans.c.rollout_id, spans.c.attempt_id).where(
            spans.c.trace_id.in_({trace_id for trace_id, _ in some}),
            spans.c.span_id.in_([span_id for _, span_id in some]),
        )
        for row in connection.execute(query):
            each = unplaced.get((row.trace_id, row.span_id))
            if each is not None and each.rollout_id == row.rollout_id:
                each.attempt_id = row.attempt_id


def next_sequence_ids(connection: Connection, rollout_id: str, how_many: int = 1) -> range:
    """Reserve unique sequence ids for spans of a rollout, higher than those of its stored spans."""
    return _reserve(connection, {rollout_id: how_many})[rollout_id]


def _reserve(connection: Connection, how_many: Mapping[str, int]) -> dict[str, range]:
    """Reserve sequence ids for spans of rollouts."""
    # Sorted as in `add`.
    run_many(connection, _MORE, sorted(how_many.items()))
    reserved: dict[str, range] = {}
    for some in in_parts([*how_many]):
        for rollout_id, last in found(connection, span_sequences, ("rollout_id", "last"), "rollout_id", some):
            reserved[rollout_id] = range(last - how_many[rollout_id] + 1, last + 1)
    return reserved


def _text(common: bytes | None) -> str | None:
    return None if common is None else common.decode()


def _column(text: str) -> str:
    # The body has the text unchanged; the column is for searching, and not every database can hold a NUL in a text.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def span_json(row: Any) -> bytes:
    """Return the JSON object of a span: of a `NewSpan`, or of a row of `listing`."""
    known = {"rollout_id": row.rollout_id, "attempt_id": row.attempt_id, "sequence_id": row.sequence_id}
    common = row.common
    if isinstance(common, str):
        common = text_of(common).encode()
    body = json.dumps(known).encode()[:-1] + b"," + row.body[1:]
    return body if common is None else body[:-1] + b"," + common[1:]


def listing(
    rollout_id: str | None = None,
    attempt_id: str | None = None,
    filter_logic: Logic = "and",
    **texts_wanted: str | None,
) -> Listing:
    """List the spans of a rollout, or of a trace, with the recorded token ids of the answers that they name.

    Args:
        rollout_id: None for the spans of the trace `trace_id`, also those without a rollout.
        attempt_id: `latest` for those of the latest attempt; None for those of all.
        filter_logic: how the other filters combine.
        texts_wanted: `trace_id`, `span_id`, `parent_id`, `name`, or one of these with `_contains`.
    """

    def where(connection: Connection) -> ColumnElement[bool]:
        must, may = [], []
        if rollout_id is None:
            must.append(spans.c.trace_id == texts_wanted.get("trace_id"))
        else:
            must.append(spans.c.rollout_id == rollout_id)
        wanted = attempt_id
        if wanted == "latest":
            wanted = rollouts.attempt_id_of(connection, rollout_id or "", wanted)
            if wanted is None:
                must.append(false())
        if wanted is not None:
            must.append(spans.c.attempt_id == wanted)
        for name in SEARCHED:
            if (whole := texts_wanted.get(name)) is not None:
                may.append(spans.c[name] == whole)
            if (part := texts_wanted.get(f"{name}_contains")) is not None:
                may.append(contains(spans.c[name], part))
        return matching([*must, matching(may, filter_logic)], "and")

    columns = ("key", "rollout_id", "attempt_id", "sequence_id", "response_id", "body")
    query = select(*(spans.c[name] for name in columns), tables.texts.c.text.label("common")).select_from(
        spans.outerjoin(tables.texts, tables.texts.c.key == spans.c.common_key)
    )
    return Listing(query, spans.c.key, where, _with_recorded_ids)


def outlines(connection: Connection, rollout_id: str, limit: int, largest: int) -> Sequence[Any]:
    """Read the first spans of a rollout, in order, without large bodies.

    Args:
        largest: bytes of a body; the body of a larger span is None. A database knows a value's length without reading
            the value.
    """
    columns = [column for column in spans.c if column.name not in ("attempt_id", "body")]
    body = case((func.length(spans.c.body) <= largest, spans.c.body)).label("body")
    query = (
        select(*columns, ATTEMPT_OF_SPAN, body)
        .where(spans.c.rollout_id == rollout_id)
        .order_by(spans.c.sequence_id, spans.c.key)
    )
    return connection.execute(query.limit(limit)).all()


def _with_recorded_ids(connection: Connection, rows: list[Any]) -> list[Any]:
    """Add the recorded token ids to spans that name an answer and arrived without them."""
    named = {text_of(row.response_id) for row in rows if row.response_id is not None}
    recorded = triplets.of_responses(connection, named) if named else {}
    return [_with_ids(row, recorded.get(text_of(row.response_id))) for row in rows] if recorded else rows


def _with_ids(row: Any, recorded: Triplet | None) -> Any:
    if recorded is None:
        return row
    body = json.loads(row.body)
    known = body["attributes"]
    # With the names that the tracer of Agent Lightning 0.3 writes and its adapters read.
    new: dict[str, Any] = {}
    for name in ("prompt_token_ids", "response_token_ids"):
        if name not in known and (ids := getattr(recorded, name)) is not None:
            new[name] = ids.tolist()
    if LOGPROBS not in known and recorded.logprobs is not None:
        new[LOGPROBS] = to_json([{"logprob": each} for each in recorded.logprobs.tolist()])
    if not new:
        return row
    body = to_json({**body, "attributes": {**known, **new}}).encode()
    return SimpleNamespace(**{**row._mapping, "body": body})
