"""The tables, as SQLAlchemy Core has them.

Those of generations are laid out to be small: ids are binary, texts that repeat are kept once and stood for by a
number, and each index has what its query asks for and no more. Token ids are little-endian int32, logprobs
little-endian float32.

Those of rollouts, attempts, spans, resources and workers have what is asked for in columns, and what is given back
as it came as JSON. Their moments are seconds since the epoch, as the LightningStore interface has them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
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
    "ENDS_THAT_WERE_LEFT",
    "attempts",
    "choices",
    "generations",
    "losses",
    "metadata",
    "probes",
    "resources",
    "rollouts",
    "secrets",
    "sender_minutes",
    "senders",
    "sessions",
    "span_sequences",
    "spans",
    "texts",
    "uploads",
    "vocabularies",
    "workers",
]

metadata = MetaData()

# SQLite gives numbers to a primary key of this one type; every number of its may be as large.
_Key = BigInteger().with_variant(Integer, "sqlite")
# Texts are in the order of their characters, as SQLite has them, whatever the language of the database is.
_Text = Text().with_variant(Text(collation="C"), "postgresql")

texts = Table(
    "texts",
    metadata,
    Column("key", _Key, primary_key=True),
    # Not the text itself, which may be long: an index would have it a second time.
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("text", _Text, nullable=False),
)
"""Texts that repeat. The columns of other tables that end in `_key` hold keys of this one."""

generations = Table(
    "generations",
    metadata,
    # Numbered as they are written: rows that are appended fill their pages, rows in the order of ids would not.
    Column("key", _Key, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("call_id", LargeBinary),
    Column("request_id", _Text, nullable=False),
    Column("response_id", _Text),
    Column("endpoint_key", _Key),
    Column("model_key", _Key),
    Column("rollout_key", _Key),
    Column("attempt_key", _Key),
    Column("session_key", _Key),
    Column("trace_id", _Text),
    Column("started_at", BigInteger),
    Column("first_token_at", BigInteger),
    Column("finished_at", BigInteger, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("sampling_params_key", _Key),
    Column("logprobs_mode_key", _Key),
    Column("cached_tokens", BigInteger),
    # Of whoever has written it.
    Column("sender_key", _Key),
    # How many ids there are, of all choices: who counts them need not read them.
    Column("prompt_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("prompt_token_ids", LargeBinary),
    Column("prompt_text", _Text),
)

choices = Table(
    "choices",
    metadata,
    Column("generation_key", _Key, primary_key=True),
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("token_ids", LargeBinary),
    Column("logprobs", LargeBinary),
    Column("text", _Text),
    Column("finish_reason_key", _Key),
    Column("stop_reason", _Text),
    Column("weight_versions", _Text),
    Column("routed_experts", LargeBinary),
)
"""`stop_reason` and `weight_versions` are JSON; `routed_experts` is its shape, three uint32, and then int16."""

losses = Table(
    "losses",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("count", BigInteger, nullable=False),
    Column("reason", _Text, nullable=False),
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Column("host", _Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
)

senders = Table(
    "senders",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("host", _Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("version", _Text, nullable=False),
    Column("vllm", _Text),
    Column("model", _Text),
    # The vocabulary's, which may come later.
    Column("digest", LargeBinary),
    Column("seen_at", BigInteger, nullable=False),
)
"""Who writes generations, and when something was heard of it last."""

sender_minutes = Table(
    "sender_minutes",
    metadata,
    Column("sender_key", _Key, primary_key=True, autoincrement=False),
    # Since the epoch.
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("generations", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    # Nanoseconds. No integers: what a wrong clock makes of them, and their sum, has no bound.
    Column("lag_sum", Double, nullable=False),
    Column("lag_max", Double, nullable=False),
)
"""What was written in a minute, and how long after it had finished."""

vocabularies = Table(
    "vocabularies",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    # As `Vocabulary.to_bytes` has it.
    Column("body", LargeBinary, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("rollout_id", _Text, nullable=False, unique=True),
    Column("input", _Text, nullable=False),
    Column("start_time", Double, nullable=False),
    Column("end_time", Double),
    Column("mode", _Text),
    Column("resources_id", _Text),
    Column("status", _Text, nullable=False),
    Column("config", _Text, nullable=False),
    Column("metadata", _Text),
    # Nanoseconds since the epoch; of those that were queued at once, the lower key comes first.
    Column("queued_at", BigInteger),
    # How many there have been: the latest is the one with this `sequence_id`.
    Column("attempts", Integer, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("rollout_key", _Key, primary_key=True, autoincrement=False),
    Column("sequence_id", Integer, primary_key=True),
    Column("attempt_id", _Text, nullable=False),
    Column("start_time", Double, nullable=False),
    Column("end_time", Double),
    Column("status", _Text, nullable=False),
    Column("worker_id", _Text),
    Column("last_heartbeat_time", Double),
    Column("metadata", _Text),
    # When it times out or counts as unresponsive, unless something is heard of it; only while its rollout is under way.
    Column("deadline", Double),
)

spans = Table(
    "spans",
    metadata,
    Column("key", _Key, primary_key=True),
    # Neither is there of a span that came without a rollout: it is found by its trace.
    Column("rollout_id", _Text),
    Column("attempt_id", _Text),
    Column("sequence_id", BigInteger, nullable=False),
    Column("trace_id", _Text, nullable=False),
    Column("span_id", _Text, nullable=False),
    Column("parent_id", _Text),
    Column("name", _Text, nullable=False),
    Column("start_time", Double),
    Column("end_time", Double),
    # Whether its sender gave it its sequence_id. Else the store did when it arrived, which says nothing of when it was.
    Column("is_numbered", Boolean),
    # What it says that others look for: the `id` of a model's answer, and a reward.
    Column("response_id", _Text),
    Column("reward", Double),
    # A JSON object of what many spans have in common: resource and scope. Null where the body has them.
    Column("common_key", _Key),
    # A JSON object of all else but rollout_id, attempt_id and sequence_id.
    Column("body", LargeBinary, nullable=False),
)

span_sequences = Table(
    "span_sequences",
    metadata,
    Column("rollout_id", _Text, primary_key=True),
    Column("last", BigInteger, nullable=False),
)
"""The highest `sequence_id` that a span of the rollout has, or that was given out for one."""

resources = Table(
    "resources",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("resources_id", _Text, nullable=False, unique=True),
    Column("create_time", Double, nullable=False),
    Column("update_time", Double, nullable=False),
    Column("version", Integer, nullable=False),
    Column("resources", _Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("worker_id", _Text, nullable=False, unique=True),
    Column("status", _Text, nullable=False),
    Column("heartbeat_stats", _Text),
    Column("last_heartbeat_time", Double),
    Column("last_dequeue_time", Double),
    Column("last_busy_time", Double),
    Column("last_idle_time", Double),
    Column("current_rollout_id", _Text),
    Column("current_attempt_id", _Text),
)

sessions = Table(
    "sessions",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("trace_id", _Text, nullable=False, unique=True),
    Column("project_id", _Text, nullable=False),
    Column("rollout_id", _Text, nullable=False),
    Column("attempt_id", _Text, nullable=False),
    # Whether the rollout was made for it.
    Column("is_own", Boolean, nullable=False),
)
"""The traces that are attempts, and which."""

uploads = Table(
    "uploads",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("upload_id", _Text, nullable=False, unique=True),
    Column("kind", _Text, nullable=False),
    Column("project_id", _Text, nullable=False),
    Column("trace_id", _Text),
    Column("create_time", Double, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

probes = Table(
    "probes",
    metadata,
    Column("name", _Text, primary_key=True),
    Column("written_at", Double, nullable=False),
)
"""Written to find out whether the database can be written."""

secrets = Table(
    "secrets",
    metadata,
    Column("name", _Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
"""What those who serve the same database have in common, and nobody else."""


def _index(name: str, *columns: Column[Any], where: ColumnElement[bool] | None = None, unique: bool = False) -> None:
    Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


def _index_where_set(table: Table, name: str, *columns: str) -> None:
    found = [table.c[column] for column in columns]
    _index(f"{table.name}_{name}", *found, where=found[0].is_not(None))


# The counts of a rollout are read here alone.
_OF_ROLLOUT = ("rollout_key", "finished_at", "attempt_key", "status", "prompt_tokens", "output_tokens")
_index_where_set(generations, "by_rollout", *_OF_ROLLOUT)
_index_where_set(generations, "by_session", "session_key", "finished_at")
_index_where_set(generations, "by_call", "call_id")
_index_where_set(generations, "by_response", "response_id")
# By what the rows are read in the order of; the rest is looked at here, without going to rows that hold long blobs.
_BY_TIME = ("finished_at", "key", "status", "model_key", "rollout_key", "attempt_key")
_index("generations_by_time", *(generations.c[column] for column in _BY_TIME))
_index("losses_by_time", losses.c.last_at)

_index_where_set(rollouts, "queued", "queued_at", "key")
_index("rollouts_by_status", rollouts.c.status)
_index_where_set(attempts, "by_deadline", "deadline")
_SPAN_OF_ROLLOUT = (spans.c.rollout_id, spans.c.attempt_id, spans.c.span_id)
_index("spans_of_rollout", *_SPAN_OF_ROLLOUT, where=spans.c.rollout_id.is_not(None), unique=True)
_index("spans_of_none", spans.c.trace_id, spans.c.span_id, where=spans.c.rollout_id.is_(None), unique=True)
_index("spans_of_trace", spans.c.trace_id)
_index_where_set(spans, "of_response", "response_id")
# From which the last reward of every rollout is read, without going to their bodies.
_index("spans_with_reward", spans.c.rollout_id, spans.c.sequence_id, spans.c.reward, where=spans.c.reward.is_not(None))
_index_where_set(uploads, "of_trace", "trace_id")
_index("resources_by_time", resources.c.update_time)

ENDS_THAT_WERE_LEFT = (
    "UPDATE rollouts SET end_time = NULL WHERE status NOT IN ('failed', 'succeeded', 'cancelled')",
    "UPDATE attempts SET end_time = NULL WHERE status IN ('preparing', 'running')",
)
"""Version 1 left a rollout, and an attempt, that ran again the time at which it had ended before."""
