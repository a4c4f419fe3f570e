"""The HTTP request that an engine request belongs to: its rollout, and what the engine was asked for it.

A middleware opens a context for each HTTP request, with the rollout that its path or headers name. A context variable
leads back to it from where token ids are made: vLLM registers a request to the engine in the task that serves the HTTP
request, or in one that this task has started. A call of a program in vLLM's own process has a context, too.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from agentlightning.generation import new_id
from agentlightning.instrumentation.vllm import _carriers
from agentlightning.instrumentation.vllm._carriers import CARRIER_HEADER, Caller, is_probe
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.rollout_name import is_id, outside_of_blocks

__all__ = [
    "App",
    "EngineRequest",
    "RequestContext",
    "RequestContextMiddleware",
    "RolloutPrefix",
    "call_in",
    "collect_engine_requests",
    "context_of",
    "current",
    "is_read",
    "run_in",
    "without_prefix",
]

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

logger = logging.getLogger("agentlightning")

# In the scope rather than beside it: middleware may hand on a copy.
_CONTEXT = "agentlightning.context"

# On the path as it was sent: an encoded slash is part of an id, not the end of it.
_PREFIX = re.compile(
    rb"/rollout/(?P<rollout>[^/]+)(?:/attempt/(?P<attempt>[^/]+))?(?:/sampling/(?P<sampling>[^/]+))?(?P<rest>/.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request to the engine: the ids that it consumes and produces.

    Attributes:
        request_id: the frontend's name for it, without vLLM's own suffix.
        prompt_token_ids: the ids that went in; None for a prompt of embeddings.
        detokenizer: vLLM's, which keeps the ids that come out.
    """

    request_id: str
    prompt_token_ids: list[int] | None
    detokenizer: Any

    @property
    def token_ids(self) -> list[int]:
        """The ids generated so far: all of them, once the request has ended."""
        # Copied: vLLM extends its list for as long as the request lives.
        return list(self.detokenizer.output_token_ids)


class RolloutPrefix(NamedTuple):
    """The part of a path that names a rollout.

    Attributes:
        root_path: the root path in front of it, if the path came with one.
        removed: the prefix behind that, encoded as it came.
    """

    root_path: str
    removed: str


@dataclass(slots=True)
class RequestContext(Caller):
    """An HTTP request, or a call of a program in vLLM's own process: what it says about itself, and its requests to the
    engine if an endpoint collects them.

    Attributes:
        endpoint: the path of its route, or the method that the program called.
        model: the one that it asks for, or else the server's.
        served_model: the one that answers in its place, if that is another (`AGL_MODEL_NAMES`).
        base_id: the part that the ids of its answer and of its engine requests share.
        text_limit: the number of ids from which on a prompt's ids may not match its text.
        prefix: the prefix that was removed from its path, if any.
        scope: the ASGI scope, with what vLLM keeps in its `state`.
        collects: whether `engine_requests` are wanted.
        turns: its chat prompts, as `continuation` describes them.
        is_search: whether vLLM searches beams for it: then it draws no tokens.
        differing: names of sampling parameters whose value is not the one to be pinned.
        replaced: the client's values of those that were pinned.
    """

    endpoint: str | None = None
    model: str | None = None
    served_model: str | None = None
    base_id: str | None = None
    text_limit: int | None = None
    prefix: RolloutPrefix | None = None
    scope: Mapping[str, Any] | None = None
    # Not for every endpoint: a beam search makes thousands, and nothing would read them.
    collects: bool = False
    engine_requests: list[EngineRequest] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)
    is_search: bool = False
    differing: frozenset[str] = frozenset()
    replaced: Mapping[str, Any] | None = None
    _call_id: str | None = None

    @property
    def call_id(self) -> str:
        """A UUID, made when it is first asked for: most requests are not recorded."""
        if self._call_id is None:
            self._call_id = new_id()
        return self._call_id


_current: ContextVar[RequestContext | None] = ContextVar("agentlightning.request", default=None)


def current() -> RequestContext | None:
    """Return the context of the HTTP request that this task serves, if there is one."""
    return _current.get()


def context_of(*arguments: Any) -> RequestContext:
    """Return the current context, or else that of the HTTP request among the arguments of a call; an empty one if none.

    A program that answers by an app of its own, which lacks our middleware, hands the request to vLLM's serving class.
    """
    found = _current.get()
    if found is None:
        scopes = (getattr(each, "scope", None) for each in arguments)
        scope = next((each for each in scopes if isinstance(each, MutableMapping) and each.get("type") == "http"), None)
        of_scope = None if scope is None else contained("reading a request's rollout", _read_scope, scope)
        found = of_scope[1] if of_scope else RequestContext()
    return found


async def collect_engine_requests(
    create: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
) -> tuple[Any, RequestContext]:
    """Return the result of `create(*args, **kwargs)`, and the context that collects the engine requests of it."""
    context = context_of(*args, *kwargs.values())
    context.collects = True
    return await run_in(context, lambda: create(*args, **kwargs)), context


async def run_in(context: RequestContext, create: Callable[[], Awaitable[Any]]) -> Any:
    """Run `create()` with `context` current; if it returns a stream, the stream too, to its end.

    A server inside another program may lack our middleware, and run-batch has none.
    """
    if _current.get() is context:
        return await create()
    token = _current.set(context)
    try:
        answer = await create()
    finally:
        _current.reset(token)
    return _stream_in(context, answer) if isinstance(answer, AsyncGenerator) else answer


def call_in(context: RequestContext, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`, run with `context` current."""
    token = _current.set(context)
    try:
        return function(*args, **kwargs)
    finally:
        _current.reset(token)


async def _stream_in(context: RequestContext, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yield the stream's items, each made with `context` current: a generator runs in its consumer's context."""
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


class RequestContextMiddleware:
    """ASGI: open a `RequestContext` for each request, and remove what names its rollout from its path and its API key.

    It must be outermost, so that whatever guards a path sees the path that is routed, and the key that the server
    knows. A malformed prefix stays, and vLLM answers as to any unknown path; so does a malformed end of a key.

    Attributes:
        app: the application behind it.
        reads_path: whether a prefix is taken off.
    """

    def __init__(self, app: App, *, reads_path: bool = True) -> None:
        self.app = app
        self.reads_path = reads_path

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        # An app around this one may have read it already.
        if scope["type"] not in ("http", "websocket") or is_read(scope):
            return await self.app(scope, receive, send)
        found = contained("reading a request's rollout", _read_scope, scope, self.reads_path)
        scope, context = found or (scope, RequestContext())
        if context.prefix:
            send = _keep_prefix_in_redirects(scope, context.prefix, send)
        # The body may still name a rollout.
        if context.rollout_id is None or is_probe(context):
            send = _add_carrier_header(context, send)
        # A websocket has no context: each of its messages is an engine request. Set to None rather than left alone,
        # since a server may handle it in the context of the previous request on the same connection.
        token = _current.set(context if scope["type"] == "http" else None)
        try:
            with outside_of_blocks():
                await self.app(scope, receive, send)
        finally:
            _current.reset(token)


def is_read(scope: Scope) -> bool:
    """Tell whether what names a rollout in the path or the key was taken off already."""
    return _CONTEXT in scope


def _read_scope(scope: Scope, reads_path: bool = True) -> tuple[Scope, RequestContext]:
    """Return the scope without what names a rollout in its path or key, and the context that it describes."""
    if is_read(scope):
        return scope, scope[_CONTEXT]
    context = RequestContext()
    # A cheap test first, since this runs for every request.
    if reads_path and "/rollout/" in scope["path"]:
        scope = without_prefix(scope, context)
    headers, in_key = _carriers.without_name(scope.get("headers", ()))
    if in_key is not None:
        scope = {**scope, "headers": headers}
    context.scope = scope
    context.endpoint = scope["path"].removeprefix(scope.get("root_path", ""))
    _carriers.read_headers(dict(headers), in_key, context)
    if context.sampling is not None and not session.settings.sampling.is_on:
        _warn_unpinned()
    if context.prefix is not None or in_key is not None:
        # Not in the context's own scope, which would hold itself.
        scope = {**scope, "headers": [*headers, *_carriers.as_headers(context, headers)], _CONTEXT: context}
    return scope, context


@functools.cache
def _warn_unpinned() -> None:
    logger.warning(
        "agentlightning: a call names sampling parameters of its rollout, but AGL_SAMPLING is off, so they are "
        "ignored; this is logged once"
    )


def without_prefix(scope: Scope, context: RequestContext) -> Scope:
    """Return the scope without what names a rollout in its path, and note that; the scope itself if nothing does."""
    root = scope.get("root_path", "").encode()
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    # Behind a proxy, the path comes either with --root-path in front or without, if the proxy removes it.
    before = root if root and path.startswith(root + b"/") else b""
    match = _PREFIX.fullmatch(path[len(before) :])
    if match is None:
        return scope
    ids = [_decoded(part) if part else None for part in match.group("rollout", "attempt")]
    if not all(is_id(part) for part in ids if part):
        return scope
    if match["sampling"]:
        context.sampling = _carriers.pins_or_none("path", _decoded(match["sampling"]))
        if context.sampling is None:
            return scope
    context.rollout_id, context.attempt_id = ids
    context.carrier = "path"
    context.prefix = RolloutPrefix(before.decode(), path[len(before) : -len(match["rest"])].decode("latin-1"))
    rest = before + match["rest"]
    # Decoded once, as the server decodes it: "path" is what is guarded and what is routed.
    return {**scope, "path": _decoded(rest), "raw_path": rest}


def _keep_prefix_in_redirects(scope: Scope, prefix: RolloutPrefix, send: Send) -> Send:
    """Return a `send` that puts the prefix back into redirects to the same path with or without a final slash.

    Starlette redirects if only that path has a route. It keeps its own `root_path` there, but has never seen the
    prefix.
    """

    # Not a coroutine function: it is called for each chunk of a stream.
    def send_with_prefix(message: MutableMapping[str, Any]) -> Awaitable[None]:
        if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
            message = contained("keeping the prefix of a redirect", _redirect_with_prefix, message, scope, prefix) or (
                message
            )
        return send(message)

    return send_with_prefix


def _add_carrier_header(context: RequestContext, send: Send) -> Send:
    """Return a `send` that adds the header by which `agl doctor` learns which carrier named the rollout of its call."""

    def send_with_carrier(message: MutableMapping[str, Any]) -> Awaitable[None]:
        if message["type"] == "http.response.start" and is_probe(context):
            header = (CARRIER_HEADER.encode(), str(context.carrier).encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        return send(message)

    return send_with_carrier


def _redirect_with_prefix(message: MutableMapping[str, Any], scope: Scope, prefix: RolloutPrefix) -> dict[str, Any]:
    headers = [
        (name, _with_prefix(value, scope, prefix) if name.lower() == b"location" else value)
        for name, value in message.get("headers", ())
    ]
    return {**message, "headers": headers}


def _with_prefix(location: bytes, scope: Scope, prefix: RolloutPrefix) -> bytes:
    """Return a redirect's location, with the prefix if its path differs from the requested one by a slash at most."""
    to = urlsplit(location.decode("latin-1"))
    host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
    requested, path, before = scope["path"].rstrip("/"), unquote(to.path).rstrip("/"), prefix.root_path
    if to.netloc.lower() not in ("", host.lower(), *_addresses(scope)):
        return location
    if path != requested:
        # Older releases of Starlette put the root path in front of a path that came without it.
        before = scope.get("root_path", "")
        if not before or path != f"{before}{requested}":
            return location
    if not to.path.startswith(before):
        return location
    path = f"{before}{prefix.removed}{to.path[len(before) :]}"
    return urlunsplit(to._replace(path=path)).encode("latin-1")


def _addresses(scope: Scope) -> tuple[str, ...]:
    """Return the names that a redirect may have for this server if the request has no Host header."""
    server = scope.get("server")
    return (str(server[0]), f"{server[0]}:{server[1]}") if server else ()


def _decoded(part: bytes) -> str:
    # Most parts have nothing to decode, and this runs for every request.
    return unquote(part) if b"%" in part or not part.isascii() else part.decode()
