"""Uploads: what a session's agent has printed, and objects that it has sent.

Everything here works inside a transaction of somebody else's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets as randomness
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Connection, func, select

from agentlightning.store.database import insert_if_new, now
from agentlightning.store.tables import secrets, uploads

__all__ = ["Kind", "add", "find", "of_trace", "secret"]

Kind = Literal["logs", "objects"]

SECRET_BYTES = 32
SECRET = "agentops"


def secret(connection: Connection) -> bytes:
    """What tokens are signed with, and what ids are made of that nobody guesses: the same for all who serve this."""
    insert_if_new(connection, secrets, name=SECRET, value=randomness.token_bytes(SECRET_BYTES))
    return connection.execute(select(secrets.c.value).where(secrets.c.name == SECRET)).scalar_one()


def add(connection: Connection, kind: Kind, project_id: str, trace_id: str | None, body: bytes) -> str:
    """Keep it, once however often it is sent; returns its id."""
    parts = (kind.encode(), project_id.encode(), (trace_id or "").encode(), hashlib.sha256(body).digest())
    digest = hmac.digest(secret(connection), b"\0".join(parts), "sha256")
    upload_id = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    about = {"kind": kind, "project_id": project_id, "trace_id": trace_id, "create_time": now(connection)}
    insert_if_new(connection, uploads, upload_id=upload_id, body=body, **about)
    return upload_id


def find(connection: Connection, kind: Kind, upload_id: str) -> bytes | None:
    """What was sent."""
    query = select(uploads.c.body).where(uploads.c.kind == kind, uploads.c.upload_id == upload_id)
    return connection.execute(query).scalar()


def of_trace(connection: Connection, trace_id: str) -> Sequence[Any]:
    """`upload_id`, `kind` and `size`, in bytes, of what was sent with a trace, in the order in which it came."""
    columns = (uploads.c.upload_id, uploads.c.kind, func.length(uploads.c.body).label("size"))
    return connection.execute(select(*columns).where(uploads.c.trace_id == trace_id).order_by(uploads.c.key)).all()
