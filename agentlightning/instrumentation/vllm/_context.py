"""One HTTP request, from its arrival to its answer: whose it is, and what the engine was asked for it.

A context variable leads from the place where token ids are born back to the request that they are for: vLLM registers
a request to the engine in the task that serves the HTTP request, or in one that this has started.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from agentlightning.generation import new_id
from agentlightning.instrumentation.vllm._isolation import contained

__all__ = [
    "EngineRequest",
    "Prefix",
    "RequestContext",
    "RequestContexts",
    "collecting",
    "current",
    "enter",
    "ignored",
    "is_id",
    "opened",
]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What one request to the engine consumes and produces.

    Attributes:
        request_id: as the frontend names it: vLLM's own suffix is not part of it.
        prompt_token_ids: the ids that went in; None for a prompt of embeddings, which has none.
        detokenizer: vLLM's, which keeps the ids that come out.
    """

    request_id: str
    prompt_token_ids: list[int] | None
    detokenizer: Any

    @property
    def token_ids(self) -> list[int]:
        """The ids that have come out so far: all of them, once the request has ended."""
        # Copied: vLLM extends its list for as long as the request lives.
        return list(self.detokenizer.output_token_ids)


class Prefix(NamedTuple):
    """The part of a path that names a rollout.

    Attributes:
        before: the root path, if the path came with it.
        taken: what was taken off the path behind that, encoded as it came.
    """

    before: str
    taken: str


@dataclass(slots=True)
class RequestContext:
    """Whose a request is, where it says so, and its requests to the engine, where an endpoint wants them.

    Attributes:
        rollout_id, attempt_id, session_id, trace_id, request_id: as its path or its headers say.
        endpoint: the path of its route.
        model: the one that it asks for, or the server's where it names none.
        base_id: what vLLM makes the ids of its answer and of its engine requests of.
        text_limit: from how many ids on a prompt of its may hold others than its text stands for.
        prefix: what was taken off its path, if anything was.
        scope: the HTTP request as ASGI has it, with what vLLM keeps in its `state`.
        collects: whether `engine_requests` are wanted.
    """

    rollout_id: str | None = None
    attempt_id: str | None = None
    session_id: str | None = None
    trace_id: str | None = None
    request_id: str | None = None
    endpoint: str | None = None
    model: str | None = None
    base_id: str | None = None
    text_limit: int | None = None
    prefix: Prefix | None = None
    scope: Mapping[str, Any] | None = None
    # Not for every endpoint: a beam search makes thousands, and nobody would read them.
    collects: bool = False
    engine_requests: list[EngineRequest] = field(default_factory=list)
    _call_id: str | None = None

    @property
    def call_id(self) -> str:
        """A UUID, made when it is first asked for: most requests are not kept."""
        if self._call_id is None:
            self._call_id = new_id()
        return self._call_id


_current: ContextVar[RequestContext | None] = ContextVar("agentlightning.request", default=None)


def current() -> RequestContext | None:
    """The request that this task works for; None where none was opened."""
    return _current.get()


def enter(context: RequestContext | None) -> None:
    """From here on this task, and those that it starts, work for `context`."""
    _current.set(context)


async def collecting(create: Callable[[], Awaitable[Any]]) -> tuple[Any, RequestContext]:
    """What `create()` answers, and the context that collects the engine requests made for it."""
    context = _current.get() or RequestContext()
    context.collects = True
    return await opened(create, context), context


async def opened(create: Callable[[], Awaitable[Any]], context: RequestContext) -> Any:
    """What `create()` answers in `context`: the one that is open by then, or one of its own.

    A server inside another program may have no door of ours, and run-batch has none. An answer that is a stream is made
    in the context to its end.
    """
    if _current.get() is context:
        return await create()
    token = _current.set(context)
    try:
        answer = await create()
    finally:
        _current.reset(token)
    return _within(context, answer) if isinstance(answer, AsyncGenerator) else answer


async def _within(context: RequestContext, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The stream as it is, each step of it made in `context`: a generator runs in the context of who asks for more."""
    async with aclosing(stream):
        while True:
            token = _current.set(context)
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _current.reset(token)
            yield item


# ASGI: opens each request's context, with the rollout that its path or headers name, before vLLM looks at it.

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
            enter(context if scope["type"] == "http" else None)
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
