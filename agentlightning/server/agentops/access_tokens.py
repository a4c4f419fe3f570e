"""Access tokens (JWT): the AgentOps SDK trades its key for one, and sends it with every other request."""

from __future__ import annotations

import hmac
import time
import uuid
from dataclasses import dataclass

import jwt

__all__ = ["AccessToken", "AccessTokens"]

ALGORITHM = "HS256"
AUDIENCE = "agentops"
# The SDK requests a token once, at its start: everything that it sends with an expired one is lost.
SECONDS_TO_LIVE = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A valid token.

    Attributes:
        id: unique to the token.
        project_id: the same for all tokens of one key.
    """

    id: str
    project_id: str


class AccessTokens:
    """Issue and verify tokens; all servers with the same secret accept each other's.

    Args:
        secret: signs the tokens.
        key: the only key to trade for tokens; None to accept any.
    """

    def __init__(self, secret: bytes, key: str | None) -> None:
        self._secret = secret
        self._project_id = None if key is None else self.project_id(key)

    def project_id(self, key: str) -> str:
        """Return the project id of a key, which does not reveal the key."""
        digest = hmac.digest(self._secret, key.encode("utf-8", "surrogateescape"), "sha256")
        return str(uuid.UUID(bytes=digest[:16], version=4))

    def trade(self, key: str) -> tuple[str, AccessToken] | None:
        """Return a new token for a key, encoded and decoded; None if the key is wrong."""
        token = AccessToken(uuid.uuid4().hex, self.project_id(key))
        if not self._is_accepted(token.project_id):
            return None
        claims = {
            "aud": AUDIENCE,
            "exp": int(time.time()) + SECONDS_TO_LIVE,
            "jti": token.id,
            "project_id": token.project_id,
        }
        return jwt.encode(claims, self._secret, ALGORITHM), token

    def read(self, sent: str) -> AccessToken | None:
        """Decode a token; None if it is malformed, expired, or from another store or key."""
        required = ["aud", "exp", "jti", "project_id"]
        try:
            claims = jwt.decode(
                sent, self._secret, algorithms=[ALGORITHM], audience=AUDIENCE, options={"require": required}
            )
        except jwt.InvalidTokenError:
            return None
        token = AccessToken(str(claims["jti"]), str(claims["project_id"]))
        return token if self._is_accepted(token.project_id) else None

    def _is_accepted(self, project_id: str) -> bool:
        return self._project_id is None or hmac.compare_digest(project_id, self._project_id)
