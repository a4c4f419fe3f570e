"""Tokens: what the AgentOps SDK gets for its key, and sends with all else."""

from __future__ import annotations

import hmac
import time
import uuid
from dataclasses import dataclass

import jwt

__all__ = ["Token", "Tokens"]

ALGORITHM = "HS256"
AUDIENCE = "agentops"
# The SDK asks for one at its start, and never again: what is sent with an expired one is lost to it.
SECONDS_TO_LIVE = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Token:
    """One that holds.

    Attributes:
        id: of its own.
        project_id: of whoever has its key.
    """

    id: str
    project_id: str


class Tokens:
    """Trades keys for tokens, and knows its own: those of all servers that have its secret.

    Args:
        secret: what they are signed with.
        key: the only one that is traded; None where any is.
    """

    def __init__(self, secret: bytes, key: str | None) -> None:
        self._secret = secret
        self._project_id = None if key is None else self.project_id(key)

    def project_id(self, key: str) -> str:
        """The project of a key, which does not tell the key."""
        digest = hmac.digest(self._secret, key.encode("utf-8", "surrogateescape"), "sha256")
        return str(uuid.UUID(bytes=digest[:16], version=4))

    def trade(self, key: str) -> tuple[str, Token] | None:
        """A new token for a key, as it is sent, and what is in it; None where the key is wrong."""
        token = Token(uuid.uuid4().hex, self.project_id(key))
        if not self._is_ours(token.project_id):
            return None
        claims = {
            "aud": AUDIENCE,
            "exp": int(time.time()) + SECONDS_TO_LIVE,
            "jti": token.id,
            "project_id": token.project_id,
        }
        return jwt.encode(claims, self._secret, ALGORITHM), token

    def read(self, sent: str) -> Token | None:
        """What is in a token; None where it is none, has expired, or is of another store or key."""
        required = ["aud", "exp", "jti", "project_id"]
        try:
            claims = jwt.decode(
                sent, self._secret, algorithms=[ALGORITHM], audience=AUDIENCE, options={"require": required}
            )
        except jwt.InvalidTokenError:
            return None
        token = Token(str(claims["jti"]), str(claims["project_id"]))
        return token if self._is_ours(token.project_id) else None

    def _is_ours(self, project_id: str) -> bool:
        return self._project_id is None or hmac.compare_digest(project_id, self._project_id)
