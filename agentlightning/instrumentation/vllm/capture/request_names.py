"""Parse the id of a request to the engine: all that an engine core, or vLLM's gRPC server, has of the HTTP request.

A frontend makes it of its answer's id and eight more characters, and the answer's id of a prefix and the client's
`X-Request-Id`: `chatcmpl-ROLLOUT.ATTEMPT-eaf61e22`. If the client sent no such header, random hexadecimal digits take
its place: 8 by the Rust frontend, 16 by the Python frontend. Older releases use 32; some programs
also name rollouts like that, so those are taken for rollouts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from agentlightning.rollout_name import RolloutName, is_id, parse_name

__all__ = ["RequestName", "parse", "parse_client_id"]

ENDPOINTS = {"chatcmpl": "/v1/chat/completions", "cmpl": "/v1/completions"}

# With n > 1, vLLM puts each choice's number in front: 0_chatcmpl-...
_NAME = re.compile(
    r"(?:(?P<index>\d+)_)?(?P<response>(?:(?P<kind>chatcmpl|cmpl)-)?(?P<client>.+?))(?:-[0-9a-f]{8})?", re.DOTALL
)
_NUMBER = re.compile(r"-\d+$")
# Also the names of the requests that vLLM's gRPC server warms up with.
_RANDOM = re.compile(r"[0-9a-f]{8}|[0-9a-f]{16}|smg-warmup-\d+")


class RequestName(NamedTuple):
    """The parts of an id; None where it has no such part.

    Attributes:
        request_id: the engine's id without what was added to the frontend's.
        response_id: the `id` of the answer.
        endpoint: the route's path.
        rollout_id, attempt_id, agent_id: from `X-Request-Id`, as the client sent it.
        choice: the choice's number among the `n` of one request.
    """

    request_id: str
    response_id: str
    endpoint: str | None = None
    rollout_id: str | None = None
    attempt_id: str | None = None
    agent_id: str | None = None
    choice: int = 0


def parse(request_id: str, from_rust: bool) -> RequestName:
    """Parse an id that a frontend gave to an engine.

    Args:
        from_rust: the Rust frontend made it. Other frontends number the prompts of a request for completions.
    """
    match = _NAME.fullmatch(request_id)
    if match is None:
        return RequestName(request_id, request_id)
    name, client = match["response"], match["client"]
    response = name
    if match["kind"] == "cmpl" and not from_rust:
        response, client = _NUMBER.sub("", name), _NUMBER.sub("", client)
    return RequestName(
        name, response, ENDPOINTS.get(match["kind"]), *parse_client_id(client), choice=int(match["index"] or 0)
    )


def parse_client_id(client: str) -> RolloutName:
    """Return what a client's own id names: `ROLLOUT`, `ROLLOUT.ATTEMPT`, or what `parse_name` reads."""
    named = parse_name(client)
    if named is not None:
        return named if all(is_id(each) for each in named if each) else RolloutName()
    if _RANDOM.fullmatch(client) or not is_id(client):
        return RolloutName()
    rollout, _, attempt = client.rpartition(".")
    return RolloutName(rollout, attempt) if rollout and attempt else RolloutName(client)
