"""The caller, as an HTTP request names it: its rollout, and the agent and the purpose of the call.

A carrier brings a rollout's id: the path, headers, the body's `user`, or the API key. `docs/recording.md` has their
order. `SOURCES` is the one table of what agents say of themselves: which header becomes which field. Headers that are
not in it are ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from agentlightning.rollout_name import RolloutName, is_id, parse_name
from agentlightning.sampling import Pins, parse_pins, text_of

__all__ = [
    "CARRIERS",
    "CARRIER_HEADER",
    "PROBE",
    "PROBE_PARAMS",
    "SOURCES",
    "Caller",
    "InKey",
    "as_headers",
    "conflicting_names",
    "follow",
    "has_probe_params",
    "ignored_ids",
    "is_forwarded",
    "is_probe",
    "names_rollout_in_key",
    "pins_or_none",
    "read_headers",
    "read_user",
    "skipped_probes",
    "skips_probe",
    "without_name",
]

CARRIERS = ("path", "x-agl-rollout-id", "baggage", "x-request-id", "x-correlation-id", "user", "key")
"""Carriers of a rollout's id in an HTTP request, in the order in which they count."""
_ORDER = ("block", *CARRIERS, "trace_headers", "request_id")
"""All carriers in this order: around those of HTTP stand those of a call that a program makes itself."""
PROBE = "agl-doctor-"
"""Begins the ids of rollouts by which `agl doctor` finds out which carriers arrive; 32 hexadecimal digits follow."""
PROBE_PARAMS = {"temperature": 0.697003, "top_p": 0.913721}
"""Sampling parameters of these calls, which tell one whose rollout does not arrive: every router lets them through."""
CARRIER_HEADER = "x-agl-carrier"
"""A header of the answers to these calls: the carrier that named the rollout."""
LARGEST_RETRY = 2**31 - 1
LONGEST_PURPOSE = 256

ignored_ids: Counter[str] = Counter()
"""Number of ignored ids, by source: longer than 256 characters, or with a forbidden character."""
conflicting_names: Counter[str] = Counter()
"""Number of calls of which two carriers named different rollouts or attempts, by the carrier that was not followed."""

skipped_probes: Counter[str] = Counter()
"""Number of calls by `agl doctor`, which are not recorded, by the carrier that arrived; or else `none`."""

_PROBE_ID = re.compile(rf"{PROBE}[0-9a-f]{{32}}")
# Values are percent-encoded, so that they can hold the characters that end them.
_MEMBER = rb"(?:rollout|attempt|agent|sampling)=[^,@\s]+"
_IN_KEY = re.compile(rb"@(%b(?:,%b)*)\Z" % (_MEMBER, _MEMBER))
_SAMPLING_HEADER = b"x-agl-sampling"

# Also what stands for bytes that were not UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufffd]")

_UTF_8 = ("utf-8", "replace")
_KEY_HEADERS = (b"authorization", b"x-api-key")
_TEXT_HEADERS = (b"x-request-id", b"x-correlation-id")
_FORWARDING_HEADERS = (
    *(b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"),
    b"x-envoy-external-address",
)


@dataclass(slots=True)
class Caller:
    """The caller that a request names. An unknown field is None.

    Attributes:
        rollout_id, attempt_id, carrier_agent_id: from the first carrier that names a rollout.
        session_id, agent_id, parent_agent_id, purpose, retry: as in a `Generation`.
        trace_id: of the W3C `traceparent`.
        carrier: the one that named the rollout; None if none did.
        sampling: the sampling parameters that the rollout has pinned, empty where it has the client's; None where it
            names none.
    """

    rollout_id: str | None = None
    attempt_id: str | None = None
    session_id: str | None = None
    agent_id: str | None = None
    parent_agent_id: str | None = None
    purpose: str | None = None
    retry: int | None = None
    trace_id: str | None = None
    carrier: str | None = None
    carrier_agent_id: str | None = None
    sampling: Pins | None = None

    @property
    def calling_agent_id(self) -> str | None:
        """The agent that has called: sub-agents name themselves, and a key is that of all of them."""
        return self.agent_id or self.carrier_agent_id


class Source(NamedTuple):
    """A header that says something of the caller.

    Attributes:
        header: its name, in lower case.
        member: the member of its baggage or of its JSON object; None for its whole value.
        beside: another header without which it says something else.
        unless: a value that says less than the sources after it.
    """

    header: bytes
    member: str | None = None
    beside: bytes | None = None
    unless: str | None = None


_CODEX = b"x-codex-turn-metadata"
SOURCES: Mapping[str, Sequence[Source]] = {
    "session_id": (
        Source(b"x-session-id"),
        Source(b"x-claude-code-session-id"),
        Source(b"session-id"),
        Source(_CODEX, "session_id"),
        Source(b"x-opencode-session"),
    ),
    "agent_id": (
        Source(b"x-agl-agent-id"),
        Source(b"baggage", "agentlightning.agent_id"),
        Source(b"x-claude-code-agent-id"),
        Source(b"thread-id"),
        Source(_CODEX, "thread_id"),
        # A sub-agent of opencode is a session of its own.
        Source(b"x-session-id", beside=b"x-parent-session-id"),
        Source(b"x-session-affinity", beside=b"x-parent-session-id"),
    ),
    "parent_agent_id": (
        Source(b"x-agl-parent-agent-id"),
        Source(b"baggage", "agentlightning.parent_agent_id"),
        Source(b"x-claude-code-parent-agent-id"),
        Source(b"x-codex-parent-thread-id"),
        Source(_CODEX, "parent_thread_id"),
        Source(b"x-parent-session-id"),
    ),
    "purpose": (
        Source(b"x-agl-purpose"),
        Source(b"baggage", "agentlightning.purpose"),
        Source(b"x-claude-code-request-class"),
        Source(_CODEX, "request_kind", unless="turn"),
        Source(b"x-openai-subagent"),
        Source(_CODEX, "subagent_kind"),
        Source(_CODEX, "request_kind"),
    ),
    "retry": (Source(b"x-stainless-retry-count"),),
}
"""Headers that say something, by field: ours, and those that agents and SDKs send by themselves. The first counts."""
_READ: Mapping[bytes, Sequence[str]] = {
    header: [field for field, sources in SOURCES.items() if header in {source.header for source in sources}]
    for header in (
        *(b"x-agl-rollout-id", b"x-agl-attempt-id", b"baggage", _SAMPLING_HEADER, *_TEXT_HEADERS, b"traceparent"),
        *(source.header for sources in SOURCES.values() for source in sources),
    )
}
"""Every header that is read, with the fields that it may say."""
_PURPOSE_AS_SENT = (b"x-agl-purpose", b"baggage")
_SAME_PURPOSE = {
    "turn": "main",
    "subagent": "sub-agent",
    "collab_spawn": "sub-agent",
    "thread_spawn": "sub-agent",
    "compact": "compaction",
}
"""The agents' words for a purpose that has a word here."""


class InKey(NamedTuple):
    """The end of an API key: a rollout, and the sampling parameters that it has pinned, as text."""

    name: RolloutName
    sampling: str | None


def without_name(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], InKey | None]:
    """Return the headers with API keys as the server knows them, and what the first of these keys had named.

    A key may end in `@rollout=ROLLOUT[,attempt=ATTEMPT][,agent=AGENT][,sampling=SAMPLING]`, in any order. Any other end
    is part of the key.
    """
    found: list[tuple[bytes, bytes]] = []
    named = None
    for name, value in headers:
        if name in _KEY_HEADERS and (split := _split_key(value)) is not None:
            value, in_key = split
            if named is not None and named.name != in_key.name:
                conflicting_names["key"] += 1
            named = named or in_key
        found.append((name, value))
    return found, named


def names_rollout_in_key(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether an API key ends as one that names a rollout does."""
    return any(name in _KEY_HEADERS and b"@rollout=" in value for name, value in headers)


def as_headers(caller: Caller, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield headers that name what was taken off a path or a key, for servers to which the request is forwarded.

    A caller's own headers stay. Of ids that are not ASCII there is none: not every HTTP client could forward it.
    """
    there = {name for name, _ in headers}
    if caller.rollout_id is None or b"x-agl-rollout-id" in there:
        return
    for name, value in (
        (b"x-agl-rollout-id", caller.rollout_id),
        (b"x-agl-attempt-id", caller.attempt_id),
        (b"x-agl-agent-id", caller.carrier_agent_id),
        (_SAMPLING_HEADER, None if caller.sampling is None else text_of(caller.sampling)),
    ):
        if value is not None and value.isascii() and name not in there:
            yield name, value.encode()


def _split_key(key: bytes) -> tuple[bytes, InKey] | None:
    """Return a key without its end, and what this names; None for a key that does not end so."""
    match = _IN_KEY.search(key)
    members = [member.partition(b"=")[::2] for member in match[1].split(b",")] if match else []
    values = {name.decode(): unquote(value.decode(*_UTF_8)) for name, value in members}
    if match is None or "rollout" not in values or len(values) < len(members):
        if b"@rollout=" in key:
            ignored_ids["key"] += 1
        return None
    name = RolloutName(*(values.get(name) for name in ("rollout", "attempt", "agent")))
    return key[: match.start()], InKey(name, values.get("sampling"))


def read_headers(headers: Mapping[bytes, bytes], in_key: InKey | None, caller: Caller) -> None:
    """Note what headers say of the caller, who may have been named in the path.

    Args:
        headers: by their names in lower case, without what an API key had named.
        in_key: what the API key had named.
    """
    # Most calls have none or one of all these headers, and this runs for every request.
    found = _READ.keys() & headers.keys()
    if not found and in_key is None:
        return
    reader = _Reader(headers)
    for carrier, named in _names(headers, in_key and in_key.name, reader):
        follow(caller, carrier, named)
    if caller.sampling is None:
        caller.sampling = _sampling(reader, in_key)
    for field in {field for header in found for field in _READ[header]}:
        value = next(reader.values(field), None)
        if value is not None:
            setattr(caller, field, _CONVERT[field](value) if field in _CONVERT else value)
    if b"traceparent" in headers:
        caller.trace_id = _trace_id(headers[b"traceparent"].decode("latin-1"))
        if caller.trace_id is None:
            ignored_ids["traceparent"] += 1


def read_user(user: Any, caller: Caller) -> None:
    """Note what the `user` of a request's body names.

    Nothing has to be behind the ids in it: unlike the id of a request, it is the same for each call.
    """
    named = parse_name(f"{user}/") if isinstance(user, str) else None
    if named is not None:
        follow(caller, "user", named)


def is_forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a proxy or a router has forwarded the request, as far as headers show it.

    Not every router shows it: vllm-router's chat and completions have the client's own headers.
    """
    values = dict(headers)
    if not values.keys().isdisjoint(_FORWARDING_HEADERS):
        return True
    agent = values.get(b"user-agent")
    if agent is None:
        # As the HTTP client of routers in Rust sends it, of which the caller's headers are gone. Only the absence of
        # User-Agent would prove nothing: Python's http.client sends none either.
        return values.get(b"accept") == b"*/*" and b"accept-encoding" not in values
    return agent.lower().startswith(b"litellm/")


def is_probe(caller: Caller | None) -> bool:
    """Tell whether `agl doctor` made a call, to find out whether a carrier arrives."""
    return caller is not None and caller.rollout_id is not None and _PROBE_ID.fullmatch(caller.rollout_id) is not None


def skips_probe(caller: Caller | None, request: Any) -> bool:
    """Tell whether one of vLLM's requests is not to be recorded, since `agl doctor` made it; such a one is counted."""
    is_named = is_probe(caller)
    if not is_named and not has_probe_params(request.sampling_params):
        return False
    skipped_probes[(caller and is_named and caller.carrier) or "none"] += 1
    return True


def has_probe_params(params: Any) -> bool:
    """Tell whether these are the sampling parameters of a call by `agl doctor`."""
    # Not for equality: some routers make float32 of numbers.
    return all(abs((getattr(params, name, None) or 0) - value) < 1e-6 for name, value in PROBE_PARAMS.items())


def _names(
    headers: Mapping[bytes, bytes], in_key: RolloutName | None, reader: _Reader
) -> Iterator[tuple[str, RolloutName]]:
    """Yield what each carrier among the headers names."""
    if b"x-agl-rollout-id" in headers or b"x-agl-attempt-id" in headers:
        yield "x-agl-rollout-id", RolloutName(reader.value(b"x-agl-rollout-id"), reader.value(b"x-agl-attempt-id"))
    if b"baggage" in headers:
        ids = (reader.value(b"baggage", f"agentlightning.{name}") for name in ("rollout_id", "attempt_id"))
        yield "baggage", RolloutName(*ids)
    for name in _TEXT_HEADERS:
        named = parse_name(headers[name].decode(*_UTF_8)) if name in headers else None
        if named is not None:
            yield name.decode(), named
        elif name == b"x-request-id":
            # It names a rollout where no Python answers, so what could not is counted here, too.
            reader.value(name)
    if in_key is not None:
        yield "key", in_key


def follow(caller: Caller, carrier: str, named: RolloutName) -> None:
    """Name a caller's rollout, with the attempt and the agent beside it, unless an earlier carrier has done so.

    Carriers may be read in any order.
    """
    rollout, attempt, agent = (_valid_id(carrier, value) for value in named)
    if rollout is None:
        if caller.rollout_id is None:
            caller.attempt_id = caller.attempt_id or attempt
        return
    other, other_rollout, other_attempt = carrier, rollout, attempt
    if caller.carrier is None or _ORDER.index(carrier) < _ORDER.index(caller.carrier):
        other, other_rollout, other_attempt = caller.carrier, caller.rollout_id, caller.attempt_id
        caller.rollout_id, caller.attempt_id = rollout, attempt
        caller.carrier, caller.carrier_agent_id = carrier, agent
    if other is not None and (
        other_rollout != caller.rollout_id or (other_attempt is not None and other_attempt != caller.attempt_id)
    ):
        conflicting_names[other] += 1


def pins_or_none(carrier: str, text: str | None) -> Pins | None:
    """Parse the sampling parameters that a rollout has pinned; None where there are none, or invalid ones."""
    if not text:
        return None
    try:
        return parse_pins(text)
    except ValueError:
        ignored_ids[f"sampling in {carrier}"] += 1
        return None


def _sampling(reader: _Reader, in_key: InKey | None) -> Pins | None:
    """Return what the first carrier says that has sampling parameters."""
    for carrier, text in (
        ("x-agl-sampling", reader.value(_SAMPLING_HEADER)),
        ("baggage", reader.value(b"baggage", "agentlightning.sampling")),
        ("key", in_key and in_key.sampling),
    ):
        if (pins := pins_or_none(carrier, text)) is not None:
            return pins
    return None


def _retry(text: str) -> int | None:
    is_count = text.isascii() and text.isdigit() and len(text) < 11
    return int(text) if is_count and int(text) <= LARGEST_RETRY else None


_CONVERT: Mapping[str, Callable[[str], Any]] = {"retry": _retry}
"""Conversions of fields that are not kept as headers have them."""


class _Reader:
    """Reads values of headers, each header once."""

    def __init__(self, headers: Mapping[bytes, bytes]) -> None:
        self._headers = headers
        self._members: dict[bytes, Mapping[str, Any]] = {}
        self._values: dict[tuple[bytes, str | None], str | None] = {}

    def values(self, field: str) -> Iterator[str]:
        """Yield what the sources of a field say, in their order."""
        is_valid = _is_purpose if field == "purpose" else is_id
        for header, member, beside, unless in SOURCES[field]:
            if header in self._headers and (beside is None or beside in self._headers):
                value = self.value(header, member, is_valid)
                if value is not None and value != unless:
                    is_agents_word = field == "purpose" and header not in _PURPOSE_AS_SENT
                    yield _SAME_PURPOSE.get(value, value) if is_agents_word else value

    def value(self, header: bytes, member: str | None = None, is_valid: Callable[[str], bool] = is_id) -> str | None:
        """Return the value of a header, or of a member of it; None where it has none that is valid."""
        if header not in self._headers:
            return None
        which = header, member
        # An invalid id counts once, whatever it could have been.
        if which not in self._values:
            self._values[which] = _valid_id(header.decode(), self._text(header, member), is_valid)
        return self._values[which]

    def _text(self, header: bytes, member: str | None) -> str | None:
        text = self._headers[header].decode(*_UTF_8)
        if member is None:
            return text.strip()
        if header not in self._members:
            self._members[header] = _baggage(text) if header == b"baggage" else _json_object(text)
        value = self._members[header].get(member)
        return value if isinstance(value, str) else None


def _is_purpose(text: str) -> bool:
    """Tell whether a text can be a purpose: any of at most so many characters, without control characters."""
    return len(text) <= LONGEST_PURPOSE and not _CONTROL.search(text)


def _valid_id(source: str, value: str | None, is_valid: Callable[[str], bool] = is_id) -> str | None:
    if not value:
        return None
    if is_valid(value):
        return value
    ignored_ids[source] += 1
    return None


def _baggage(header: str) -> Mapping[str, str]:
    """Return the members of a W3C baggage header, without their properties (https://www.w3.org/TR/baggage/)."""
    members = (member.partition(";")[0].partition("=") for member in header.split(","))
    return {key.strip(): unquote(value.strip()) for key, equals, value in members if equals}


def _json_object(header: str) -> Mapping[str, Any]:
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _trace_id(header: str) -> str | None:
    """Return the trace id of a W3C traceparent header (https://www.w3.org/TR/trace-context/); None if it is invalid."""
    match = re.match(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", header.strip())
    return match[1] if match and set(match[1]) != {"0"} else None
