"""The drift of a rollout: its calls, read as `agentlightning.drift` compares them.

The caller owns the transaction. Comparing needs none: it may take long, and begins when the calls are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection, select

from agentlightning.drift import AttemptDrift, CallDetails, analyse
from agentlightning.store import rows, senders, tables
from agentlightning.store.database import in_parts
from agentlightning.store.trajectories import attempts_of
from agentlightning.token_text import TokenTexts
from agentlightning.trajectory import AttemptCalls

__all__ = ["Material", "analyse_all", "read", "texts_of"]

VOCABULARIES_KEPT = 4
_GENERATIONS, _SENDERS = tables.generations.c, tables.senders.c
_latest: dict[bytes, TokenTexts] = {}


@dataclass(frozen=True, slots=True)
class Material:
    """Input from which the drift of a rollout is found.

    Attributes:
        details: by the ids of generations.
        texts: by the digests of vocabularies.
    """

    attempts: list[AttemptCalls]
    details: Mapping[str, CallDetails]
    texts: Mapping[bytes, TokenTexts]


def read(connection: Connection, rollout_id: str, attempt_id: str | None = None) -> Material:
    """Read the calls of a rollout's attempts, with their vocabularies.

    Args:
        attempt_id: `latest` for the latest; None for all.
    """
    attempts = attempts_of(connection, rollout_id, attempt_id)
    ids = sorted({call.generation_id for attempt in attempts for call in attempt.calls})
    details = {each: found for some in in_parts(ids) for each, found in _details(connection, some)}
    digests = {each.vocabulary for each in details.values() if each.vocabulary is not None}
    texts = {digest: found for digest in digests if (found := texts_of(connection, digest)) is not None}
    return Material(attempts, details, texts)


def analyse_all(material: Material, model: str | None = None) -> Iterator[AttemptDrift]:
    """Find the breaks of attempts that have calls.

    Args:
        model: only calls of this model.
    """
    for attempt in material.attempts:
        found = analyse(attempt, material.details, lambda digest: material.texts.get(digest or b""), model)
        if found.calls or found.unfit:
            yield found


def _details(connection: Connection, ids: Iterable[str]) -> Iterator[tuple[str, CallDetails]]:
    query = (
        select(_GENERATIONS.id, _GENERATIONS.cached_tokens, _SENDERS.digest)
        .join_from(tables.generations, tables.senders, _SENDERS.key == _GENERATIONS.sender_key, isouter=True)
        .where(_GENERATIONS.id.in_([rows.uuid_bytes(each) for each in ids]))
    )
    for row in connection.execute(query):
        yield rows.uuid_text(row.id), CallDetails(row.cached_tokens, None if row.digest is None else bytes(row.digest))


def texts_of(connection: Connection, digest: bytes) -> TokenTexts | None:
    """Return the texts of a vocabulary; None where it is not stored, or damaged.

    The latest are kept: one takes longer to read than many rollouts.
    """
    if (known := _latest.get(digest)) is None:
        with suppress(ValueError):
            if (vocabulary := senders.vocabulary(connection, digest)) is not None:
                known = _latest[digest] = TokenTexts(vocabulary)
                for oldest in [*_latest][:-VOCABULARIES_KEPT]:
                    _latest.pop(oldest, None)
    return known
