"""Uploads of AgentOps sessions: the output of an agent, and objects that it sent. The caller owns the transaction."""

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

__all__ = ["Kind", "add", "find", "list_for_trace", "shared_secret"]

Kind = Literal["logs", "objects"]

SECRET_BYTES = 32
SECRET = "agentops"


def shared_secret(connection: Connection) -> bytes:
    """Return the secret that all servers on this database share, creating it if need be.

    It signs tokens, and makes the ids of uploads hard to guess.
    """
    insert_if_new(connection, secrets, name=SECRET, value=randomness.token_bytes(SECRET_BYTES))
    return connection.execute(select(secrets.c.value).where(secrets.c.name == SECRET)).scalar_one()


def add(connection: Connection, kind: Kind, project_id: str, trace_id: str | None, body: bytes) -> str:
    """Store an upload, once however often it is sent; returns its id."""
    parts = (kind.encode(), project_id.encode(), (trace_id or "").encode(), hashlib.sha256(body).digest())
    digest = hmac.digest(shared_secret(connection), b"\0".join(parts), "sha256")
    upload_id = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    about = {"kind": kind, "project_id": project_id, "trace_id": trace_id, "create_time": now(connection)}
    insert_if_new(connection, uploads, upload_id=upload_id, body=body, **about)
    return upload_id


def find(connection: Connection, kind: Kind, upload_id: str) -> bytes | None:
    """Return the body of an upload; None where there is none."""
    query = select(uploads.c.body).where(uploads.c.kind == kind, uploads.c.upload_id == upload_id)
    return connection.execute(query).scalar()


def list_for_trace(connection: Connection, trace_id: str) -> Sequence[Any]:
    """List `upload_id`, `kind` and `size` in bytes of the uploads of a trace, in the order in which they arrived."""
    columns = (uploads.c.upload_id, uploads.c.kind, func.length(uploads.c.body).label("size"))
    return connection.execute(select(*columns).where(uploads.c.trace_id == trace_id).order_by(uploads.c.key)).all()
