"""The HTTP client of `HttpStore`: connections, keys, and what each error of the server or of a proxy means.

urllib3 is a dependency of every vLLM, through requests.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import msgspec
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationValueError, ProtocolError, SSLError

from agentlightning import settings
from agentlightning.errors import (
    InvalidRecord,
    NotFound,
    RolloutTooLarge,
    RolloutUnderWay,
    StoreRefused,
    StoreUnavailable,
)
from agentlightning.store.wire import ERROR_HEADER, MEDIA_TYPE, NOT_FOUND, TOO_LARGE

__all__ = ["SECONDS_TO_ANSWER", "HttpClient", "StrangeAnswer", "TooLarge", "UnknownMediaType"]

ROUTES = "/v1/agl"
LINES = "application/jsonl"
JSON = "application/json"
SECONDS_TO_CONNECT = 3.0
# A server that holds as many writes as it may can need this long to write them to a slow disk.
SECONDS_TO_ANSWER = 30.0
# A proxy may ask for an hour.
LONGEST_RETRY_AFTER = 60.0
# A server closes an idle connection, `agl store` after five seconds, and may do so while a request is on its way.
SECONDS_KEPT = 3.0
BYTES_AT_ONCE = 1 << 20
# Threads that use one store at once; further ones open a connection for each request.
CONNECTIONS_KEPT = 32
# How a connection shows that the other side has closed it; the last two over TLS.
CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class TooLarge(InvalidRecord):
    """More than fits into one message, or a value that no message can hold."""


class UnknownMediaType(StoreRefused):
    """An `agl store` that does not know this kind of body, as one of an earlier version does not."""


class StrangeAnswer(StoreUnavailable):
    """A successful answer that no `agl store` gives, such as a proxy's while the store is away."""


class _Patience:
    """A connection that waits briefly for the server to accept it, and longer for everything else.

    urllib3 applies the time limit for connecting to sending a body, too: a large one takes longer on a slow link. And a
    server that refuses a large body may answer and hang up while it is being sent: its answer is read, whatever the
    error of sending was.
    """

    sock: Any
    timeout: Any
    last_used = 0.0

    def connect(self) -> None:
        seconds = self.timeout
        self.timeout = min(SECONDS_TO_CONNECT, seconds)
        try:
            super().connect()  # type: ignore[misc]
        finally:
            self.timeout = seconds
        self.sock.settimeout(seconds)
        # Over TLS, urllib3 connects before the request.
        self.last_used = time.monotonic()

    def request(self, *arguments: Any, **options: Any) -> None:
        if self.sock is not None and time.monotonic() - self.last_used > SECONDS_KEPT:
            self.close()  # type: ignore[attr-defined]
        if self.sock is None:
            self.connect()
        with suppress(*CLOSED):
            super().request(*arguments, **options)  # type: ignore[misc]


class _Connection(_Patience, HTTPConnection):
    pass


class _TlsConnection(_Patience, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls: Any = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls: Any = _TlsConnection


class HttpClient:
    """Requests to an `agl store`. Safe for several threads.

    Args:
        url, seconds: see `HttpStore`.

    Raises:
        StoreRefused: the URL or the key is malformed.
    """

    def __init__(self, url: str, seconds: float = SECONDS_TO_ANSWER) -> None:
        self.shown = settings.without_secrets(url)
        """The URL, without its key."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            # Its message would show the key.
            raise self._malformed() from None
        if not host or parts.query or parts.fragment or "@" in parts.path:
            raise self._malformed()
        self._path = parts.path.rstrip("/") + ROUTES
        self._authorization = _authorization(unquote(parts.password or parts.username or "") or settings.store_key())
        kept: Any = {
            "timeout": urllib3.Timeout(connect=seconds, read=seconds),
            "maxsize": CONNECTIONS_KEPT,
            "retries": False,
        }
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                self._pool = _TlsPool(host, port, ssl_context=context, **kept)
            else:
                self._pool = _Pool(host, port, **kept)
        except (UnicodeError, LocationValueError):
            raise self._malformed() from None

    def ask(
        self,
        method: str,
        route: str,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        kind: str = MEDIA_TYPE,
        repeatable: bool = False,
    ) -> bytes:
        """Send a request and return the body of the answer.

        Args:
            kind: media type of the body.
            repeatable: a POST that changes nothing when it is processed twice; any other method always is.

        Raises:
            StoreUnavailable: there is no answer, or it is an error that may pass.
            StoreRefused, InvalidRecord, NotFound, RolloutTooLarge, RolloutUnderWay: the answer is an error.
        """
        accept = f"{MEDIA_TYPE}, application/json"
        with self._answer(method, route, query, body, accept, kind, repeatable or method != "POST") as response:
            return response.read()

    @contextmanager
    def lines(
        self, route: str, query: Sequence[tuple[str, str]] = (), body: bytes | None = None
    ) -> Iterator[Iterator[bytes]]:
        """Read an answer of JSON Lines while it arrives.

        Args:
            body: JSON for a POST that changes nothing when it is processed twice; None for a GET.
        """
        method = "GET" if body is None else "POST"
        with self._answer(method, route, query, body, LINES, JSON, True) as response:
            yield _lines_of(response)

    def read(self, answer: bytes, kind: Any) -> Any:
        """Parse an answer that is JSON of this type.

        Raises:
            StrangeAnswer: it is not.
        """
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.strange() from error

    def strange(self) -> StrangeAnswer:
        """Make the error for an answer that no `agl store` gives."""
        return StrangeAnswer(f"{self.shown} does not answer as an agl store does")

    def close(self) -> None:
        """Close all idle connections. Idempotent."""
        self._pool.close()

    @contextmanager
    def _answer(
        self,
        method: str,
        route: str,
        query: Sequence[tuple[str, str]],
        body: bytes | None,
        accept: str,
        kind: str,
        repeatable: bool,
    ) -> Iterator[Any]:
        """Send a request and let the block read a successful answer."""
        target = self._path + route + ("?" + urlencode(query, errors="replace") if query else "")
        headers: Any = {"Accept": accept, "Content-Type": kind, **self._authorization}
        request: Any = {"body": body, "headers": headers, "redirect": False, "preload_content": False}
        try:
            try:
                response: Any = self._pool.urlopen(method, target, enforce_content_length=True, **request)
            except (ProtocolError, SSLError) as error:
                # The server has closed an idle connection at this moment. A request that has been processed may be
                # repeated only if that changes nothing.
                if not repeatable or (isinstance(error, SSLError) and not isinstance(_cause(error), CLOSED)):
                    raise
                response = self._pool.urlopen(method, target, enforce_content_length=True, **request)
            is_read, connection = False, response.connection
            try:
                if response.status not in (200, 201, 204):
                    raise self._error(response, response.read())
                yield response
                is_read = True
                if connection is not None:
                    connection.last_used = time.monotonic()
            finally:
                if not is_read:
                    # The rest of this answer would be taken for the beginning of the next one.
                    response.close()
                response.release_conn()
        except (UnicodeError, LocationValueError):
            raise self._malformed() from None
        except (OSError, HTTPError) as error:
            cause = _cause(error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                advice = "let SSL_CERT_FILE name the certificate of the authority that signed its own"
                raise StoreRefused(
                    f"{self.shown} has no trusted certificate ({cause.verify_message})", advice
                ) from error
            told = str(cause)[:200] or type(cause).__name__
            advice = "is `agl store` running there, and can this machine reach it?"
            raise StoreUnavailable(f"{self.shown} cannot be reached: {told}", advice) from error

    def _error(self, response: Any, answer: bytes) -> Exception:
        """Translate an error answer."""
        status = response.status
        said = _detail(answer) or f"{status} {response.reason}"
        is_ours = ERROR_HEADER in response.headers
        # A body that is too large stays too large, whoever says so: a proxy with a limit of its own says it every time,
        # and a sender that repeats it would never send what comes after it.
        if status == 413:
            return TooLarge(
                said if is_ours else f"a proxy before {self.shown} does not accept such a large body: {said}"
            )
        # Any other error of a proxy says nothing about the body, and may be gone in a minute.
        if status == 422 and response.headers.get(ERROR_HEADER) == TOO_LARGE:
            return RolloutTooLarge(said)
        if status in (400, 422) and is_ours:
            return InvalidRecord(said)
        if status == 404 and response.headers.get(ERROR_HEADER) == NOT_FOUND:
            return NotFound(said)
        if status == 409 and is_ours:
            return RolloutUnderWay(said)
        if status in (400, 408, 422, 429) or status >= 500:
            advice = None if is_ours else "a proxy before the store says so, or another server: see its log"
            happened = f"{self.shown} cannot be used now: {said}"
            return StoreUnavailable(happened, advice, retry_after=_retry_after(response))
        if status in (401, 403):
            advice = "set AGL_STORE_KEY to its key, or put that into the URL: http://agl:KEY@HOST:PORT"
            return StoreRefused(f"{self.shown} does not accept this key", advice)
        if status == 421:
            return StoreRefused(f"{self.shown} does not answer under this host name", said)
        if 300 <= status < 400:
            place = settings.without_secrets(response.headers.get("Location", "another URL"))
            return StoreRefused(f"{self.shown} redirects to {place[:200]}", "give the URL of the store itself")
        if status == 415 and is_ours:
            return UnknownMediaType(said)
        advice = "give the URL of an agl store, with the same version of agentlightning on both sides"
        return StoreRefused(f"{self.shown} does not accept this version's requests ({said})", advice)

    def _malformed(self) -> StoreRefused:
        form = "http(s)://HOST:PORT, or http(s)://agl:KEY@HOST:PORT with %-escapes for / ? # @ in the key"
        return StoreRefused(f"{self.shown} is not the URL of an agl store", f"write {form}")


def _lines_of(response: Any) -> Iterator[bytes]:
    rest = b""
    for part in response.stream(BYTES_AT_ONCE):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _authorization(key: str | None) -> Mapping[str, Any]:
    if key is None:
        return {}
    if any(character < " " or character == "\x7f" for character in key):
        raise StoreRefused("the store's key contains a line break or another control character", "set another key")
    return {"Authorization": b"Bearer " + key.encode("utf-8", "surrogateescape")}


def _cause(error: BaseException) -> BaseException:
    """Return the socket's own error, which urllib3 wraps in errors that name its objects."""
    while isinstance(error, HTTPError):
        inner = next((each for each in (*error.args, error.__cause__, error.__context__) if _is_inner(each)), None)
        if inner is None:
            return error
        error = inner
    return error


def _is_inner(error: object) -> bool:
    return isinstance(error, (OSError, HTTPError, HTTPException))


def _detail(answer: bytes) -> str:
    """Return the sentence of an error as `agl store` and others write it; empty where there is none."""
    try:
        return msgspec.json.decode(answer, type=dict[str, str])["detail"]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError):
        return ""


def _retry_after(response: Any) -> float | None:
    found = response.headers.get("Retry-After", "")
    return min(float(found), LONGEST_RETRY_AFTER) if found.isascii() and found.isdigit() else None
