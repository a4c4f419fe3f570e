"""The tables, as SQLAlchemy Core has them.

Those of generations are laid out to be small: ids are binary, texts that repeat are kept once and stood for by a
number, and each index has what its query asks for and no more. Token ids are little-endian int32, logprobs
little-endian float32.

Those of rollouts, attempts, spans, resources and workers have what is asked for in columns, and what is given back
as it came as JSON. Their moments are seconds since the epoch, as the LightningStore interface has them.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
)

__all__ = [
    "attempts",
    "choices",
    "generations",
    "losses",
    "metadata",
    "resources",
    "rollouts",
    "span_sequences",
    "spans",
    "texts",
    "workers",
]

metadata = MetaData()

texts = Table(
    "texts",
    metadata,
    Column("key", Integer, primary_key=True),
    # Not the text itself, which may be long: an index would have it a second time.
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("text", Text, nullable=False),
)
"""Texts that repeat. The columns of other tables that end in `_key` hold keys of this one."""

generations = Table(
    "generations",
    metadata,
    # Numbered as they are written: rows that are appended fill their pages, rows in the order of ids would not.
    Column("key", Integer, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("call_id", LargeBinary),
    Column("request_id", Text, nullable=False),
    Column("response_id", Text),
    Column("endpoint_key", Integer),
    Column("model_key", Integer),
    Column("rollout_key", Integer),
    Column("attempt_key", Integer),
    Column("session_key", Integer),
    Column("trace_id", Text),
    Column("started_at", BigInteger),
    Column("first_token_at", BigInteger),
    Column("finished_at", BigInteger, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("sampling_params_key", Integer),
    Column("logprobs_mode_key", Integer),
    Column("cached_tokens", Integer),
    Column("prompt_token_ids", LargeBinary),
    Column("prompt_text", Text),
)

choices = Table(
    "choices",
    metadata,
    Column("generation_key", Integer, primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("token_ids", LargeBinary),
    Column("logprobs", LargeBinary),
    Column("text", Text),
    Column("finish_reason_key", Integer),
    Column("stop_reason", Text),
    Column("weight_versions", Text),
    Column("routed_experts", LargeBinary),
)
"""`stop_reason` and `weight_versions` are JSON; `routed_experts` is its shape, three uint32, and then int16."""

losses = Table(
    "losses",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("count", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
)


rollouts = Table(
    "rollouts",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("rollout_id", Text, nullable=False, unique=True),
    Column("input", Text, nullable=False),
    Column("start_time", Double, nullable=False),
    Column("end_time", Double),
    Column("mode", Text),
    Column("resources_id", Text),
    Column("status", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("metadata", Text),
    # Nanoseconds since the epoch; of those that were queued at once, the lower key comes first.
    Column("queued_at", BigInteger),
    # How many there have been: the latest is the one with this `sequence_id`.
    Column("attempts", Integer, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("rollout_key", Integer, primary_key=True, autoincrement=False),
    Column("sequence_id", Integer, primary_key=True),
    Column("attempt_id", Text, nullable=False),
    Column("start_time", Double, nullable=False),
    Column("end_time", Double),
    Column("status", Text, nullable=False),
    Column("worker_id", Text),
    Column("last_heartbeat_time", Double),
    Column("metadata", Text),
    # When it times out or counts as unresponsive, unless something is heard of it; only while its rollout is under way.
    Column("deadline", Double),
)

spans = Table(
    "spans",
    metadata,
    Column("key", Integer, primary_key=True),
    # Neither is there of a span that came without a rollout: it is found by its trace.
    Column("rollout_id", Text),
    Column("attempt_id", Text),
    Column("sequence_id", BigInteger, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("span_id", Text, nullable=False),
    Column("parent_id", Text),
    Column("name", Text, nullable=False),
    Column("start_time", Double),
    Column("end_time", Double),
    # A JSON object of all but rollout_id, attempt_id and sequence_id.
    Column("body", LargeBinary, nullable=False),
)

span_sequences = Table(
    "span_sequences",
    metadata,
    Column("rollout_id", Text, primary_key=True),
    Column("last", BigInteger, nullable=False),
)
"""The highest `sequence_id` that a span of the rollout has, or that was given out for one."""

resources = Table(
    "resources",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("resources_id", Text, nullable=False, unique=True),
    Column("create_time", Double, nullable=False),
    Column("update_time", Double, nullable=False),
    Column("version", Integer, nullable=False),
    Column("resources", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("worker_id", Text, nullable=False, unique=True),
    Column("status", Text, nullable=False),
    Column("heartbeat_stats", Text),
    Column("last_heartbeat_time", Double),
    Column("last_dequeue_time", Double),
    Column("last_busy_time", Double),
    Column("last_idle_time", Double),
    Column("current_rollout_id", Text),
    Column("current_attempt_id", Text),
)


def _index_where_set(name: str, *columns: str) -> None:
    first = generations.c[columns[0]]
    Index(f"generations_by_{name}", *(generations.c[column] for column in columns), sqlite_where=first.is_not(None))


_index_where_set("rollout", "rollout_key", "finished_at")
_index_where_set("session", "session_key", "finished_at")
_index_where_set("call", "call_id")
_index_where_set("response", "response_id")
# By what the rows are read in the order of; the rest is looked at here, without going to rows that hold long blobs.
_BY_TIME = ("finished_at", "key", "status", "model_key", "rollout_key", "attempt_key")
Index("generations_by_time", *(generations.c[column] for column in _BY_TIME))

_queued = rollouts.c.queued_at.is_not(None)
Index("rollouts_queued", rollouts.c.queued_at, rollouts.c.key, sqlite_where=_queued)
Index("rollouts_by_status", rollouts.c.status)
_under_way = attempts.c.deadline.is_not(None)
Index("attempts_by_deadline", attempts.c.deadline, sqlite_where=_under_way)
_of_rollout = spans.c.rollout_id.is_not(None)
Index(
    "spans_of_rollout", spans.c.rollout_id, spans.c.attempt_id, spans.c.span_id, unique=True, sqlite_where=_of_rollout
)
Index("spans_of_none", spans.c.trace_id, spans.c.span_id, unique=True, sqlite_where=spans.c.rollout_id.is_(None))
Index("spans_of_trace", spans.c.trace_id)
Index("resources_by_time", resources.c.update_time)
