"""The tables, as SQLAlchemy Core has them.

They are laid out to be small: ids are binary, texts that repeat are kept once and stood for by a number, and each
index has what its query asks for and no more. Token ids are little-endian int32, logprobs little-endian float32.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, SmallInteger, Table, Text

__all__ = ["choices", "generations", "losses", "metadata", "texts"]

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
