"""The tables, for SQLAlchemy Core.

The tables of generations are laid out to be small: ids are binary, a repeated text is stored once and referred to by a
number, and each index has the columns that its query needs and no more. Token ids are little-endian int32, logprobs
little-endian float32; of long prompts, blocks are shared with whatever begins alike (`store.blocks`).

The tables of rollouts, attempts, spans, resources and workers have columns for what is searched or changed, and JSON
for what is returned as it arrived. Their times are seconds since the epoch, as in the LightningStore interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    func,
)
from sqlalchemy.schema import CreateIndex, CreateTable

from agentlightning.generation import SharedText, Status, Via
from agentlightning.store import rows
from agentlightning.store.rows import Layout
from agentlightning.store.stale import triggers

__all__ = [
    "ATTEMPT_OF_SPAN",
    "CLEAR_STALE_END_TIMES",
    "PARTITIONED",
    "attempts",
    "blocks",
    "breaks",
    "choices",
    "create",
    "drift_totals",
    "drifts",
    "generations",
    "losses",
    "lost_calls",
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
    "stale_rollouts",
    "summaries",
    "tallies",
    "texts",
    "uploads",
    "vocabularies",
    "watermarks",
    "workers",
]

metadata = MetaData()

# SQLite assigns keys only where the type is INTEGER, which holds 64 bits there.
_Key = BigInteger().with_variant(Integer, "sqlite")
# Texts are ordered by their code points, as in SQLite, whatever the locale of the database.
_Text = Text().with_variant(Text(collation="C"), "postgresql")

texts = Table(
    "texts",
    metadata,
    Column("key", _Key, primary_key=True),
    # An index on the text itself, which may be long, would store it a second time.
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("text", _Text, nullable=False),
)
"""Repeated texts.

The columns of `generations` and `choices` for a `SharedText` refer to them, and so does `spans.common_key`.
"""

blocks = Table(
    "blocks",
    metadata,
    Column("key", _Key, primary_key=True),
    # How many blocks there are up to this one.
    Column("depth", Integer, nullable=False),
    # Key of the block before it; 0 where there is none.
    Column("parent", _Key, nullable=False),
    Column("name", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
"""Parts of the prompts' ids and texts, as `store.blocks` makes them."""

_TYPES: dict[Any, Any] = {
    SharedText: _Key,
    int: BigInteger,
    Status: SmallInteger,
    Via: SmallInteger,
    str: _Text,
    int | str: _Text,
    list[tuple[str, int, int]]: _Text,
}
"""Types of columns by those of fields; all others are bytes."""


def _columns(layout: Layout, **options: Any) -> list[Column[Any]]:
    """Derive columns from the fields of a record.

    Args:
        options: of a field's column.
    """
    return [
        Column(
            layout.columns[name], _TYPES.get(each.type, LargeBinary), nullable=each.is_nullable, **options.get(name, {})
        )
        for name, each in layout.fields.items()
    ]


generations = Table(
    "generations",
    metadata,
    # Numbered as they are written: appended rows fill their pages, rows in the order of ids would not.
    Column("key", _Key, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    # The sender that wrote it; null for an unregistered one.
    Column("sender_key", _Key),
    # The numbers of ids, the output's of all choices, so that counting need not read the ids.
    Column("output_tokens", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    # Key of the last block of the prompt's ids and of its text; null where there is none.
    Column("ids_block", _Key),
    Column("text_block", _Key),
    *_columns(rows.GENERATION),
    # The whole, or what follows the last of its blocks, ids packed as these are.
    Column("prompt_token_ids", LargeBinary),
    Column("prompt_text", _Text),
)
"""Files of earlier versions have these columns in another order."""

choices = Table(
    "choices",
    metadata,
    Column("generation_key", _Key, primary_key=True),
    *_columns(rows.CHOICE, index={"primary_key": True, "autoincrement": False}),
)
"""`stop_reason` and `weight_versions` are JSON; `routed_experts` is its shape, three uint32, and then int16.

`sampling_mask` and `top_logprobs`, as `generations.prompt_logprobs`, are their number of positions, the number of ids
at each, all uint32, and then the ids; of the latter two, the logprobs follow.
"""

losses = Table(
    "losses",
    metadata,
    Column("key", _Key, primary_key=True),
    *_columns(rows.LOSS, id={"unique": True}),
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
    # Digest of its vocabulary, which may arrive later.
    Column("digest", LargeBinary),
    Column("seen_at", BigInteger, nullable=False),
)
"""The processes that write generations, and when each last registered or wrote."""

sender_minutes = Table(
    "sender_minutes",
    metadata,
    Column("sender_key", _Key, primary_key=True, autoincrement=False),
    # Minutes since the epoch.
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("generations", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    # Nanoseconds, as floats: with a wrong clock they, and their sum, have no bound.
    Column("lag_sum", Double, nullable=False),
    Column("lag_max", Double, nullable=False),
)
"""Counts of what a sender wrote in a minute, and how long after the generations had finished."""

vocabularies = Table(
    "vocabularies",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    # Packed by `Vocabulary.to_bytes`.
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
    # Nanoseconds since the epoch; of rollouts queued at the same time, the lower key comes first.
    Column("queued_at", BigInteger),
    # The number of attempts, which is the `sequence_id` of the latest.
    Column("attempts", Integer, nullable=False),
    # Grows with each change of the rollout or of its attempts; `store.changes` says how.
    Column("changed", BigInteger, nullable=False, server_default="0"),
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
    # When it times out or becomes unresponsive, unless a heartbeat arrives; set only while its rollout is under way.
    Column("deadline", Double),
)

spans = Table(
    "spans",
    metadata,
    Column("key", _Key, primary_key=True),
    # Both ids are null for a span that arrived without a rollout, which is found by its trace.
    Column("rollout_id", _Text),
    Column("attempt_id", _Text),
    Column("sequence_id", BigInteger, nullable=False),
    Column("trace_id", _Text, nullable=False),
    Column("span_id", _Text, nullable=False),
    Column("parent_id", _Text),
    Column("name", _Text, nullable=False),
    Column("start_time", Double),
    Column("end_time", Double),
    # Whether the sender gave it its sequence_id. If the store did, that is the order of arrival, not of events.
    Column("is_numbered", Boolean),
    # Attributes that are searched for: the `id` of a model's answer, and a reward.
    Column("response_id", _Text),
    Column("reward", Double),
    # The text with a JSON object that many spans share: resource and scope. Null where the body has them.
    Column("common_key", _Key),
    # A JSON object of all other fields but rollout_id, attempt_id and sequence_id.
    Column("body", LargeBinary, nullable=False),
)

ATTEMPT_OF_SPAN = func.nullif(spans.c.attempt_id, "").label("attempt_id")
"""The attempt of a span; null where none is known, as in `generations`.

The column has an empty text there if the span has a rollout: in a unique index, null would be unequal to null.
"""

span_sequences = Table(
    "span_sequences",
    metadata,
    Column("rollout_id", _Text, primary_key=True),
    Column("last", BigInteger, nullable=False),
)
"""The highest `sequence_id` of a rollout that a span has, or that was reserved for one."""

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
    # Whether the rollout was created for this session.
    Column("is_own", Boolean, nullable=False),
)
"""AgentOps sessions: traces, and the attempt that each belongs to."""

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
"""Rows written to test whether the database can be written."""

secrets = Table(
    "secrets",
    metadata,
    Column("name", _Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
"""Secrets shared by all servers on this database."""

watermarks = Table(
    "watermarks",
    metadata,
    Column("sender_key", _Key, primary_key=True, autoincrement=False),
    # When it registered, and when it was last heard from, by the store's clock, in nanoseconds since the epoch.
    Column("registered_at", BigInteger, nullable=False),
    Column("reported_at", BigInteger, nullable=False),
    # By the sender's clock; null until its first report.
    Column("watermark", BigInteger),
    # Nanoseconds that the store's clock is ahead of the sender's, at least; null until its second report.
    Column("clock_difference", BigInteger),
    Column("has_ended", Boolean, nullable=False),
    # JSON: [rollout_id, attempt_id, count] of the calls that were under way at the watermark.
    Column("under_way", _Text, nullable=False),
)
"""Progress of each sender: how far it has written."""

lost_calls = Table(
    "lost_calls",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", LargeBinary, nullable=False, unique=True),
    Column("sender_key", _Key, nullable=False),
    Column("rollout_id", _Text),
    Column("attempt_id", _Text),
    Column("count", BigInteger, nullable=False),
    Column("reason", _Text, nullable=False),
)
"""The calls among the losses, by rollout."""

drifts = Table(
    "drifts",
    metadata,
    Column("rollout_id", _Text, primary_key=True),
    # The number of its calls that were compared: with more of them, it is compared anew.
    Column("calls", BigInteger, nullable=False),
    # Breaks that nobody meant; NULL where its calls cannot be compared.
    Column("breaks", BigInteger),
    Column("kept", BigInteger, nullable=False),
    Column("lost", BigInteger, nullable=False),
)
"""The drift of the rollouts that were compared, for the page and the metrics; `store.drift_index` fills it."""

breaks = Table(
    "breaks",
    metadata,
    Column("rollout_id", _Text, primary_key=True),
    Column("generation_id", LargeBinary, primary_key=True),
    Column("cause", _Text, nullable=False),
    Column("is_certain", Boolean, nullable=False),
    Column("finished_at", BigInteger, nullable=False),
    Column("model", _Text),
    Column("agent_id", _Text),
)
"""The breaks of these rollouts."""

drift_totals = Table(
    "drift_totals",
    metadata,
    # A cause; `seen` is the key of the last generation that was compared, `deleted` and `revision` count deletions and
    # changes of summaries.
    Column("name", _Text, primary_key=True),
    Column("count", BigInteger, nullable=False),
)
"""Counts that only grow, whatever is deleted."""

stale_rollouts = Table(
    "stale_rollouts",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("rollout_id", _Text, nullable=False),
)
"""Rollouts that changed since their summary was made, as `store.stale` notes."""

summaries = Table(
    "summaries",
    metadata,
    Column("rollout_id", _Text, primary_key=True),
    # When it was queued, or its first call began; and when something last happened to it.
    Column("since", Double, nullable=False),
    Column("active", Double, nullable=False),
    Column("status", _Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("queued", Double),
    Column("started", Double),
    Column("attempt_started", Double),
    Column("ended", Double),
    Column("calls", BigInteger, nullable=False),
    Column("finished", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    # Mean seconds of a call that finished.
    Column("latency", Double),
    Column("reward", Double),
    Column("breaks", BigInteger),
    Column("worker", _Text),
    Column("model", _Text),
    Column("agent", _Text),
    # The weights of its last call, and the step that its trainer gave it.
    Column("version", _Text),
    Column("step", _Text),
    # A line for each: `name=value`, with a line end before and after.
    Column("tags", _Text, nullable=False),
    Column("task", _Text, nullable=False),
)
"""Summaries of rollouts for lists and charts; `store.summaries` makes them from the other tables."""

tallies = Table(
    "tallies",
    metadata,
    Column("axis", _Text, primary_key=True),
    Column("dimension", _Text, primary_key=True),
    Column("slot", _Text, primary_key=True),
    Column("name", _Text, primary_key=True),
    Column("measure", _Text, primary_key=True),
    Column("value", Double, primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("amount", Double, nullable=False),
)
"""Summaries added up by hour, step and weights, of all, and of each model, agent and worker.

`value` is rounded, so that quartiles can be read from the counts; `amount` is the exact sum.
"""


def _index(name: str, *columns: Column[Any], where: ColumnElement[bool] | None = None, unique: bool = False) -> None:
    Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


def _index_where_set(table: Table, name: str, *columns: str) -> None:
    found = [table.c[column] for column in columns]
    _index(f"{table.name}_{name}", *found, where=found[0].is_not(None))


# The counts of a rollout are read from this index alone.
_OF_ROLLOUT = ("rollout_key", "finished_at", "attempt_key", "status", "prompt_tokens", "output_tokens")
_index_where_set(generations, "by_rollout", *_OF_ROLLOUT)
_index_where_set(generations, "by_session", "session_key", "finished_at")
_index_where_set(generations, "by_call", "call_id")
_index_where_set(generations, "by_response", "response_id")
# All generations are read in this order. The other columns are filtered in the index, without visiting the rows, which
# hold long blobs.
_BY_TIME = ("finished_at", "key", "status", "model_key", "rollout_key", "attempt_key")
_index("generations_by_time", *(generations.c[column] for column in _BY_TIME))
_index("losses_by_time", losses.c.last_at)
_index("blocks_by_parent", blocks.c.parent, blocks.c.name, unique=True)
# By these, a block is known to be in use.
_index_where_set(generations, "by_ids_block", "ids_block")
_index_where_set(generations, "by_text_block", "text_block")

_index_where_set(rollouts, "queued", "queued_at", "key")
_index("rollouts_by_status", rollouts.c.status)
# Who waits reads from this index alone what has changed: an input may be long, and stands before the status in its row.
_index("rollouts_by_change", *(rollouts.c[column] for column in ("changed", "rollout_id", "status", "end_time")))
_index_where_set(attempts, "by_deadline", "deadline")
_SPAN_OF_ROLLOUT = (spans.c.rollout_id, spans.c.attempt_id, spans.c.span_id)
_index("spans_of_rollout", *_SPAN_OF_ROLLOUT, where=spans.c.rollout_id.is_not(None), unique=True)
_index("spans_of_none", spans.c.trace_id, spans.c.span_id, where=spans.c.rollout_id.is_(None), unique=True)
_index("spans_of_trace", spans.c.trace_id)
_index_where_set(spans, "of_response", "response_id")
# The last reward of every rollout is read from this index alone, without visiting the bodies.
_index("spans_with_reward", spans.c.rollout_id, spans.c.sequence_id, spans.c.reward, where=spans.c.reward.is_not(None))
_index_where_set(uploads, "of_trace", "trace_id")
_index("resources_by_time", resources.c.update_time)
_index_where_set(lost_calls, "of_rollout", "rollout_id")
_index("breaks_by_time", breaks.c.finished_at)
_index("generations_unassigned", generations.c.finished_at, where=generations.c.rollout_key.is_(None))
_index("stale_rollouts_by_id", stale_rollouts.c.rollout_id)
_index("summaries_by_start", summaries.c.since)
_index("summaries_by_activity", summaries.c.active)

CLEAR_STALE_END_TIMES = (
    "UPDATE rollouts SET end_time = NULL WHERE status NOT IN ('failed', 'succeeded', 'cancelled')",
    "UPDATE attempts SET end_time = NULL WHERE status IN ('preparing', 'running')",
)
"""Migration: version 1 left the former end time on a rollout or attempt that ran again."""

PARTITIONED = {"generations": "rollout_key", "choices": "generation_key", "spans": "rollout_id", "blocks": "parent"}
"""The large tables, which PostgreSQL may divide into partitions, and the columns by whose hash it does that."""

# A unique index of a partitioned table has the column that divides it, so these tables have others in their place.
_IN_PARTITIONS = {
    ", \n\tPRIMARY KEY (key)": "",
    ", \n\tUNIQUE (id)": "",
    "spans_of_none ON spans (trace_id, span_id)": (
        "spans_of_none ON spans (trace_id, span_id, rollout_id) NULLS NOT DISTINCT"
    ),
}
_INDEXES_IN_PARTITIONS = (
    *(f"CREATE INDEX {table}_by_key ON {table} (key)" for table in ("generations", "spans", "blocks")),
    "CREATE UNIQUE INDEX generations_by_id ON generations (id, rollout_key) NULLS NOT DISTINCT",
)

_creation: dict[str, list[str]] = {}
"""The statements of `create`, by the name of a dialect: to write them takes longer than to execute them."""


def create(connection: Connection, partitions: int | None = None) -> None:
    """Create all tables and their indexes in an empty database.

    Args:
        partitions: of the large tables, in PostgreSQL; None for tables that are not divided.
    """
    dialect = connection.dialect
    if dialect.name not in _creation:
        _creation[dialect.name] = _statements_to_create(dialect)
    statements = _creation[dialect.name]
    for statement in statements if partitions is None else _in_partitions(statements, partitions):
        connection.exec_driver_sql(statement)


def _in_partitions(statements: Sequence[str], partitions: int) -> Iterator[str]:
    """Change the statements of `create` so that the large tables are divided."""
    for statement in statements:
        start = statement.split("(")[0].split()
        name = start[-1]
        is_index = "INDEX" in start
        if name not in PARTITIONED:
            yield statement
            continue
        for old, new in _IN_PARTITIONS.items():
            statement = statement.replace(old, new)
        yield statement if is_index else f"{statement.rstrip()} PARTITION BY HASH ({PARTITIONED[name]})"
        if not is_index:
            for number in range(partitions):
                values = f"WITH (MODULUS {partitions}, REMAINDER {number})"
                yield f"CREATE TABLE {name}_{number} PARTITION OF {name} FOR VALUES {values}"
    yield from _INDEXES_IN_PARTITIONS


def _statements_to_create(dialect: Dialect) -> list[str]:
    indexes = sorted(
        (index for table in metadata.sorted_tables for index in table.indexes), key=lambda each: str(each.name)
    )
    elements = (*map(CreateTable, metadata.sorted_tables), *map(CreateIndex, indexes))
    return [*(str(element.compile(dialect=dialect)) for element in elements), *triggers(dialect.name)]
