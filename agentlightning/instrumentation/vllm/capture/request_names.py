"""What the id of a request to the engine says, where nothing else of the HTTP request arrives.

A frontend makes it of its answer's id and eight characters more, and that of a prefix, and of the client's
`X-Request-Id`: `chatcmpl-ROLLOUT.ATTEMPT-eaf61e22`. In the place of a header that was not sent there are random
hexadecimal digits: 8 of the Rust frontend, 16 of the Python frontend (32 in older releases, which some also give their
rollouts: those are taken for one).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from agentlightning.instrumentation.vllm._context import is_id

__all__ = ["RequestName", "read", "whose"]

ENDPOINTS = {"chatcmpl": "/v1/chat/completions", "cmpl": "/v1/completions"}

# Of one with n > 1, vLLM numbers the requests that it makes of it in front: 0_chatcmpl-...
_NAME = re.compile(
    r"(?:(?P<index>\d+)_)?(?P<response>(?:(?P<kind>chatcmpl|cmpl)-)?(?P<client>.+?))(?:-[0-9a-f]{8})?", re.DOTALL
)
_NUMBER = re.compile(r"-\d+$")
# Or what vLLM's gRPC server calls the requests that it warms up with.
_NOBODYS = re.compile(r"[0-9a-f]{8}|[0-9a-f]{16}|smg-warmup-\d+")


class RequestName(NamedTuple):
    """What an id says; what it does not say is None.

    Attributes:
        request_id: the engine's id without what was added to the frontend's.
        response_id: the `id` of the answer.
        endpoint: the route's path.
        rollout_id, attempt_id: `X-Request-Id: ROLLOUT`, or `ROLLOUT.ATTEMPT`, as the client sent it.
        choice: the number among the `n` of one request.
    """

    request_id: str
    response_id: str
    endpoint: str | None = None
    rollout_id: str | None = None
    attempt_id: str | None = None
    choice: int = 0


def read(request_id: str, from_rust: bool) -> RequestName:
    """What an id says that a frontend gave to an engine.

    Args:
        from_rust: whether it was the Rust frontend. The others number the prompts of a request for completions.
    """
    match = _NAME.fullmatch(request_id)
    if match is None:
        return RequestName(request_id, request_id)
    name, client = match["response"], match["client"]
    response = name
    if match["kind"] == "cmpl" and not from_rust:
        response, client = _NUMBER.sub("", name), _NUMBER.sub("", client)
    rollout, attempt = whose(client)
    return RequestName(name, response, ENDPOINTS.get(match["kind"]), rollout, attempt, int(match["index"] or 0))


def whose(client: str) -> tuple[str | None, str | None]:
    """The rollout and the attempt that a client's own id names: `ROLLOUT`, or `ROLLOUT.ATTEMPT`."""
    if _NOBODYS.fullmatch(client) or not is_id(client):
        return None, None
    rollout, _, attempt = client.rpartition(".")
    return (rollout, attempt) if rollout and attempt else (client, None)
