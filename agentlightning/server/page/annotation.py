"""A reward or a note that a person gives on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fastapi.exceptions import HTTPException
from sqlalchemy import Connection

from agentlightning.server.limits import ID_LIMIT
from agentlightning.store import ingestion

__all__ = ["Annotation"]

FIELDS = ("rollout_id", "attempt_id", "generation_id", "value", "note")
NOTE_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Annotation:
    """A reward, a note, or both, of a rollout or of one of its calls."""

    rollout_id: str
    attempt_id: str
    generation_id: str | None
    value: float | None
    note: str | None

    @classmethod
    def of_form(cls, body: bytes) -> Annotation:
        """Read it from the form of the page.

        Raises:
            HTTPException: a field is missing, or has a value that it may not have.
        """
        try:
            fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=len(FIELDS)))
        except ValueError as error:
            raise HTTPException(422, "the body is not the form of the page") from error
        ids = {name: fields.get(name, "") for name in FIELDS[:3]}
        if not ids["rollout_id"] or any(len(each) > ID_LIMIT or "\0" in each for each in ids.values()):
            raise HTTPException(422, "the form names no rollout, or its ids are none")
        note = fields.get("note", "").replace("\r\n", "\n").strip()
        if len(note) > NOTE_LIMIT:
            raise HTTPException(422, f"the note has more than {NOTE_LIMIT} characters")
        value = _number(fields.get("value", ""))
        if value is None and not note:
            raise HTTPException(422, "give a reward, a note, or both: go back, and fill one in")
        return cls(ids["rollout_id"], ids["attempt_id"] or "latest", ids["generation_id"] or None, value, note or None)

    def add(self, connection: Connection) -> None:
        """Store it; see `ingestion.annotate`."""
        ingestion.annotate(connection, self.rollout_id, self.attempt_id, self.value, self.generation_id, self.note)

    @property
    def target(self) -> tuple[str, Mapping[str, Any]]:
        """Path and query of the page that shows it."""
        if self.generation_id is not None:
            return "/generation", {"id": self.generation_id}
        return "/rollout", {"id": self.rollout_id}


def _number(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HTTPException(422, f"the reward must be a number, not {text[:100]!r}")
    return value
