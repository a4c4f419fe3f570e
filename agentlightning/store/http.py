"""Generations in an `agl store`, over HTTP, by means of the standard library, and of msgspec, which vLLM comes with."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead, InvalidURL
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlencode, urlsplit

import msgspec

from agentlightning import settings
from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss, Status
from agentlightning.sender import Sender
from agentlightning.store import Filters, Store, wire
from agentlightning.store.rows import uuid_bytes
from agentlightning.store.wire import ERROR_HEADER, MEDIA_TYPE, Refusal
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HttpStore"]

ROUTES = "/v1/agl"
LINES = "application/jsonl"
SECONDS_TO_CONNECT = 3.0
# What a server that has taken as much as it takes at once may need to write it to a slow disk.
SECONDS_TO_ANSWER = 30.0
# A proxy may ask for an hour.
LONGEST_RETRY_AFTER = 60.0
GENERATIONS_AT_ONCE = 64
BYTES_AT_ONCE = 1 << 20
# How a connection that the other side has closed shows; the others are how it does with TLS.
CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class _Unsendable(ValueError):
    """What is too much for one message, or cannot be in any."""


class _Added(msgspec.Struct):
    new: int
    refused: list[Refusal]
    sender: Literal["known", "unknown"] | None = None


class _Greeted(msgspec.Struct):
    vocabulary: Literal["known", "wanted"] | None


class _Rollout(msgspec.Struct):
    status: str


class _Rollouts(msgspec.Struct):
    items: list[_Rollout]


class HttpStore(Store):
    """The generations of an `agl store`. Connections are kept alive: as many as threads have asked at once.

    Args:
        url: `http(s)://HOST:PORT`, with a path where a proxy has the store there; a user or password is the key, which
            is `AGL_STORE_KEY` if there is none.

    Raises:
        StoreUnavailable: it cannot be reached, or used, now.
        StoreRefused: no `agl store`, or one that asks for another key.
    """

    def __init__(self, url: str) -> None:
        self._shown = settings.without_secrets(url)
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            # Which would show the key.
            raise self._no_url() from None
        if not self._host or parts.query or parts.fragment or "@" in parts.path:
            raise self._no_url()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/") + ROUTES
        self._authorization = _authorization(unquote(parts.password or parts.username or "") or settings.store_key())
        self._idle: list[HTTPConnection] = []
        self._greeted: Sender | None = None
        try:
            if self._read(self._ask("GET", "/health"), Any) != {"status": "ok"}:
                raise StoreRefused(f"{self._shown} is no agl store")
        except _Strange as error:
            raise StoreRefused(f"{self._shown} is no agl store") from error

    def greet(self, sender: Sender) -> None:
        # What is none would be another route.
        uuid_bytes(sender.id)
        self._greeted = sender
        told = {name: getattr(sender, name) for name in ("host", "pid", "started_at", "version", "vllm", "model")}
        vocabulary = sender.vocabulary
        told["vocabulary"] = None if vocabulary is None else vocabulary.digest.hex()
        body = msgspec.json.encode(wire.without_surrogates(told))
        answer = self._read(self._ask("PUT", f"/senders/{sender.id}", body=body, kind="application/json"), _Greeted)
        if vocabulary is not None and answer.vocabulary == "wanted":
            route = f"/vocabularies/{vocabulary.digest.hex()}"
            self._ask("PUT", route, body=vocabulary.to_bytes(), kind="application/octet-stream")

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        new, refused = self._send(generations, sender_id)
        if refused:
            raise InvalidRecord({each.id: each.reason for each in refused}, new)
        return new

    def generations(self, **filters: Unpack[Filters]) -> Iterator[Generation]:
        asked = [*_query(filters), ("limit", str(GENERATIONS_AT_ONCE))]
        cursor: list[tuple[str, str]] = []
        while True:
            found = self._envelope(self._ask("GET", "/generations", [*asked, *cursor]))
            yield from found.generations
            if found.next is None:
                return
            cursor = [("cursor", found.next)]

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        return self._read(self._ask("GET", "/generations/tally", list(_query(filters))), dict[Status, int])

    def add_losses(self, losses: Sequence[Loss]) -> None:
        self._ask("POST", "/generations", body=wire.encode((), losses))

    def losses(self) -> Iterator[Loss]:
        yield from self._read(self._ask("GET", "/losses"), dict[str, list[Loss]])["items"]

    def rollout_status(self, rollout_id: str) -> str | None:
        # What is no id to the queue, for it is too long or has a NUL, is of none of its rollouts.
        with suppress(ValueError):
            # Not as a part of the path: an id may have a slash.
            answer = self._ask("GET", "/rollouts", [("rollout_id_in", rollout_id), ("limit", "1")])
            for each in self._read(answer, _Rollouts).items:
                return each.status
        return None

    def triplets(self, rollout_id: str | None = None, attempt_id: str | None = None) -> Iterator[Triplet]:
        ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
        # Not as parts of the path: an id may have a slash.
        asked = [(name, value) for name, value in ids.items() if value is not None]
        with ExitStack() as stack:
            try:
                response = stack.enter_context(self._asked("GET", "/triplets", asked, accept=LINES))
            except ValueError:
                # What the queue takes for no id is of none of its rollouts.
                return
            for line in _lines_of(response):
                try:
                    found = Triplet.from_dict(self._read(line, dict[str, Any]))
                except (KeyError, TypeError, ValueError) as error:
                    raise self._strange() from error
                yield found

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _send(self, generations: Sequence[Generation], sender_id: str | None) -> tuple[int, list[Refusal]]:
        """How many were new, and which of them were refused."""
        if not generations:
            return 0, []
        try:
            return self._post(generations, sender_id)
        except _Unsendable as error:
            if len(generations) == 1:
                return 0, [Refusal(str(generations[0].id), str(error))]
        middle = len(generations) // 2
        first, refused = self._send(generations[:middle], sender_id)
        second, also = self._send(generations[middle:], sender_id)
        return first + second, [*refused, *also]

    def _post(self, generations: Sequence[Generation], sender_id: str | None) -> tuple[int, list[Refusal]]:
        try:
            body = wire.encode(generations, sender_id=sender_id)
        except ValueError as error:
            raise _Unsendable(str(error)) from error
        answer = self._read(self._ask("POST", "/generations", body=body), _Added)
        if answer.sender == "unknown" and self._greeted is not None and self._greeted.id == sender_id:
            # Its database is another one since it was greeted.
            with suppress(ValueError, StoreUnavailable, StoreRefused):
                self.greet(self._greeted)
        return answer.new, answer.refused

    def _ask(
        self,
        method: str,
        route: str,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        kind: str = MEDIA_TYPE,
    ) -> bytes:
        """The body of the answer."""
        with self._asked(method, route, query, body, kind=kind) as response:
            return response.read()

    @contextmanager
    def _asked(
        self,
        method: str,
        route: str,
        query: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        accept: str = f"{MEDIA_TYPE}, application/json",
        kind: str = MEDIA_TYPE,
    ) -> Iterator[HTTPResponse]:
        """Around the reading of an answer: one of success."""
        target = self._path + route + ("?" + urlencode(query, errors="replace") if query else "")
        headers = {"Accept": accept, "Content-Type": kind, **self._authorization}
        try:
            connection, response = self._answer(method, target, body, headers)
            try:
                if response.status not in (200, 201):
                    raise self._meaning(response, response.read())
                yield response
            finally:
                if response.isclosed() and not response.will_close:
                    self._idle.append(connection)
                else:
                    # What is left of the answer would be taken for the beginning of the next one.
                    connection.close()
        except ssl.SSLCertVerificationError as error:
            raise StoreRefused(f"{self._shown} has no certificate to be trusted: {error.verify_message}") from error
        except (UnicodeError, InvalidURL):
            raise self._no_url() from None
        except (OSError, HTTPException) as error:
            told = str(error)[:200] or type(error).__name__
            raise StoreUnavailable(f"{self._shown} cannot be reached: {told}") from error

    def _answer(self, *request: Any) -> tuple[HTTPConnection, HTTPResponse]:
        """The head of the answer, and where the rest of it comes from."""
        try:
            return _begun(self._idle.pop(), *request)
        except (IndexError, *CLOSED):
            # There is none, or it was closed since it was used. Whatever is asked may be asked twice.
            return _begun(self._connected(), *request)

    def _connected(self) -> HTTPConnection:
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=SECONDS_TO_CONNECT)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=SECONDS_TO_CONNECT, context=self._tls)
        connection.connect()
        connection.sock.settimeout(SECONDS_TO_ANSWER)
        return connection

    def _meaning(self, response: HTTPResponse, answer: bytes) -> Exception:
        """What an answer that is none of success means."""
        status = response.status
        said = _detail(answer) or f"{status} {response.reason}"
        is_ours = ERROR_HEADER in response.headers
        # What is too large stays so, whoever says it: a proxy with a limit of its own says it every time, and what is
        # kept back for it would keep back all that comes after it.
        if status == 413:
            return _Unsendable(said if is_ours else f"what is before {self._shown} takes no body as large: {said}")
        # What else a proxy says of a request says nothing of what is in it, and may be otherwise in a minute.
        if status in (400, 422) and is_ours:
            return ValueError(said)
        if status in (400, 408, 422, 429) or status >= 500:
            return StoreUnavailable(f"{self._shown} cannot be used now: {said}", _retry_after(response))
        if status in (401, 403):
            advice = "set AGL_STORE_KEY to its key, or put that into the URL: http://agl:KEY@HOST:PORT"
            return StoreRefused(f"{self._shown} lets nobody in without the right key: {advice}")
        if status == 421:
            return StoreRefused(f"{self._shown} is not to be asked by this name: {said}")
        if 300 <= status < 400:
            place = settings.without_secrets(response.headers.get("Location", "another place"))
            return StoreRefused(f"{self._shown} sends us to {place[:200]}: give the URL of the store itself")
        advice = "give the URL of an agl store, and let both have the same version of agentlightning"
        return StoreRefused(f"{self._shown} takes no generations of this version ({said}): {advice}")

    def _read(self, answer: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._strange() from error

    def _envelope(self, answer: bytes) -> wire.Envelope:
        try:
            return wire.decode(answer)
        except ValueError as error:
            raise self._strange() from error

    def _strange(self) -> _Strange:
        return _Strange(f"{self._shown} answers as no agl store does")

    def _no_url(self) -> StoreRefused:
        form = "http(s)://HOST:PORT, or http(s)://agl:KEY@HOST:PORT with %-escapes in the place of / ? # @ in the key"
        return StoreRefused(f"{self._shown} is no URL of an agl store: that is {form}")


class _Strange(StoreUnavailable):
    """An answer of success by somebody else: a proxy, for one, while the store is away."""


def _lines_of(response: HTTPResponse) -> Iterator[bytes]:
    """Not by iterating over it, which takes an answer that is cut off for one that is whole."""
    rest = b""
    while part := response.read(BYTES_AT_ONCE):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if response.length:
        raise IncompleteRead(rest, response.length)
    if rest:
        yield rest


def _begun(connection: HTTPConnection, *request: Any) -> tuple[HTTPConnection, HTTPResponse]:
    try:
        # Who takes no body as large may have answered, and hung up, before its end.
        with suppress(*CLOSED):
            connection.request(*request)
        return connection, connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _authorization(key: str | None) -> Mapping[str, Any]:
    if key is None:
        return {}
    if any(character < " " or character == "\x7f" for character in key):
        raise StoreRefused("the key of the store has a line break or another control character in it")
    return {"Authorization": b"Bearer " + key.encode("utf-8", "surrogateescape")}


def _query(filters: Filters) -> Iterator[tuple[str, str]]:
    for name, value in filters.items():
        if name not in Filters.__annotations__:
            raise KeyError(name)
        yield ("without", name) if value is None else (name, str(value))


def _detail(answer: bytes) -> str:
    """The sentence of an error, as `agl store` has it, and others; empty where there is none."""
    try:
        return msgspec.json.decode(answer, type=dict[str, str])["detail"]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError):
        return ""


def _retry_after(response: HTTPResponse) -> float | None:
    found = response.headers.get("Retry-After", "")
    return min(float(found), LONGEST_RETRY_AFTER) if found.isascii() and found.isdecimal() else None
