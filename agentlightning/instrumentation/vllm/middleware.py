"""ASGI: opens each request's context, with the rollout that its path or headers name, before vLLM looks at it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from agentlightning.instrumentation.vllm import request_context
from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.instrumentation.vllm.request_context import Prefix, RequestContext

__all__ = ["RequestContexts", "ignored", "is_id"]

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

MAX_ID_LENGTH = 256

ignored: Counter[str] = Counter()
"""How often, by where it stood, an id was ignored: over 256 characters, or with something in it that no id has."""

# On the path as it was sent: an encoded slash is part of an id, not the end of it.
_PREFIX = re.compile(rb"/rollout/(?P<rollout>[^/]+)(?:/attempt/(?P<attempt>[^/]+))?(?P<rest>/.*)", re.DOTALL)
# Ids come to stand in paths, shells and queries of whoever reads them. U+FFFD is what was not UTF-8.
_IN_NO_ID = re.compile(r"""[\x00-\x1f\x7f-\x9f\ufffd"'`\\]|(?:^|/)\.\.(?:/|$)""")
_SESSION_HEADERS = (b"x-session-id", b"x-claude-code-session-id")


class RequestContexts:
    """Opens a `RequestContext` for each request, and takes `/rollout/{rollout_id}[/attempt/{attempt_id}]` off its path.

    It is to be outermost, so that whoever guards a path sees the one that is routed. A prefix that is not well formed
    is left on, and vLLM answers as to any path that it does not know.

    Attributes:
        app: what it stands before.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Any, send: Send) -> Awaitable[None]:
        if scope["type"] in ("http", "websocket"):
            understood = contained("reading whose a request is", _understood, scope)
            scope, context = understood or (scope, RequestContext())
            if context.prefix:
                send = _keeping_the_prefix(scope, context.prefix, send)
            # A websocket has none: its engine requests are as many as its messages. To none, not left as it is, since
            # a server may handle it in the context of the request that came before it on the same connection.
            request_context.enter(context if scope["type"] == "http" else None)
        return self.app(scope, receive, send)


def _understood(scope: Scope) -> tuple[Scope, RequestContext]:
    """The scope without a prefix, and the context that prefix and headers describe."""
    context = RequestContext()
    # Looked at first, since this runs for every request.
    if "/rollout/" in scope["path"]:
        scope = _without_prefix(scope, context)
    context.scope = scope
    context.endpoint = scope["path"].removeprefix(scope.get("root_path", ""))
    _read_headers(dict(scope.get("headers", ())), context)
    return scope, context


def _without_prefix(scope: Scope, context: RequestContext) -> Scope:
    root = scope.get("root_path", "").encode()
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    # Both ways of reaching a server behind a proxy: with --root-path still on, or taken off by the proxy.
    before = root if root and path.startswith(root + b"/") else b""
    match = _PREFIX.fullmatch(path[len(before) :])
    if match is None:
        return scope
    ids = [_decoded(part) if part else None for part in match.group("rollout", "attempt")]
    if not all(is_id(part) for part in ids if part):
        return scope
    context.rollout_id, context.attempt_id = ids
    context.prefix = Prefix(before.decode(), path[len(before) : -len(match["rest"])].decode("latin-1"))
    rest = before + match["rest"]
    # Decoded as the server decodes it, and once: what is guarded and what is routed are both read from "path".
    return {**scope, "path": _decoded(rest), "raw_path": rest}


def _keeping_the_prefix(scope: Scope, prefix: Prefix, send: Send) -> Send:
    """`send`, with the prefix back in redirects to the same path with or without a slash at its end.

    Starlette answers so where only that path has a route. It keeps its own `root_path` there, but has never seen the
    prefix.
    """

    # No coroutine of its own: it is called for each chunk of a stream.
    def send_with_prefix(message: MutableMapping[str, Any]) -> Awaitable[None]:
        if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
            message = contained("keeping the prefix of a redirect", _redirected, message, scope, prefix) or message
        return send(message)

    return send_with_prefix


def _redirected(message: MutableMapping[str, Any], scope: Scope, prefix: Prefix) -> MutableMapping[str, Any]:
    headers = [
        (name, _with_prefix(value, scope, prefix) if name.lower() == b"location" else value)
        for name, value in message.get("headers", ())
    ]
    return {**message, "headers": headers}


def _with_prefix(location: bytes, scope: Scope, prefix: Prefix) -> bytes:
    """The location of a redirect, with the prefix if its path is the one that was asked for but for a slash."""
    to = urlsplit(location.decode("latin-1"))
    host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
    asked, path, before = scope["path"].rstrip("/"), unquote(to.path).rstrip("/"), prefix.before
    if to.netloc.lower() not in ("", host.lower(), *_addresses(scope)):
        return location
    if path != asked:
        # Older releases of Starlette put the root path before a path that came without.
        before = scope.get("root_path", "")
        if not before or path != f"{before}{asked}":
            return location
    if not to.path.startswith(before):
        return location
    path = f"{before}{prefix.taken}{to.path[len(before) :]}"
    return urlunsplit(to._replace(path=path)).encode("latin-1")


def _addresses(scope: Scope) -> tuple[str, ...]:
    """How a redirect names this server where the client's request has no Host header."""
    server = scope.get("server")
    return (str(server[0]), f"{server[0]}:{server[1]}") if server else ()


def _decoded(part: bytes) -> str:
    # Most have nothing to decode, and this runs for every request.
    return unquote(part) if b"%" in part or not part.isascii() else part.decode()


def _read_headers(headers: dict[bytes, bytes], context: RequestContext) -> None:
    # The first that names a rollout wins whole: an attempt belongs to the rollout beside it.
    if context.rollout_id is None:
        context.rollout_id = _header(headers, b"x-agl-rollout-id")
        context.attempt_id = _header(headers, b"x-agl-attempt-id")
    if context.rollout_id is None and b"baggage" in headers:
        members = dict(_baggage(headers[b"baggage"].decode("utf-8", "replace")))
        context.rollout_id = _checked("baggage", members.get("agentlightning.rollout_id"))
        context.attempt_id = _checked("baggage", members.get("agentlightning.attempt_id"))
    context.session_id = next(filter(None, (_header(headers, name) for name in _SESSION_HEADERS)), None)
    context.request_id = _header(headers, b"x-request-id")
    if b"traceparent" in headers:
        context.trace_id = _trace_id(headers[b"traceparent"].decode("latin-1"))
        if context.trace_id is None:
            ignored["traceparent"] += 1


def _header(headers: dict[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else _checked(name.decode(), value.decode("utf-8", "replace").strip())


def _checked(where: str, value: str | None) -> str | None:
    if not value:
        return None
    if is_id(value):
        return value
    ignored[where] += 1
    return None


def is_id(value: str) -> bool:
    """Whether a value can be the id of a rollout, an attempt or a session."""
    return len(value) <= MAX_ID_LENGTH and not _IN_NO_ID.search(value)


def _baggage(header: str) -> Iterator[tuple[str, str]]:
    """The members of a W3C baggage header, without their properties (https://www.w3.org/TR/baggage/)."""
    for member in header.split(","):
        key, equals, value = member.partition(";")[0].partition("=")
        if equals:
            yield key.strip(), unquote(value.strip())


def _trace_id(header: str) -> str | None:
    """The trace id of a W3C traceparent header (https://www.w3.org/TR/trace-context/); None if it is not one."""
    match = re.match(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", header.strip())
    return match[1] if match and set(match[1]) != {"0"} else None
