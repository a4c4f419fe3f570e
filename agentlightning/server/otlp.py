"""Conversion of OTLP 1.x requests, as protobuf and JSON, to the spans that the store keeps."""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from agentlightning.server.answers import encode
from agentlightning.server.decoding import has_more_in_json, has_more_in_protobuf, repair_json, repair_protobuf
from agentlightning.server.limits import DETAILS_LIMIT, ELEMENTS_LIMIT, ID_LIMIT, MESSAGES_LIMIT, NUMBER_LIMIT
from agentlightning.store.attributes import PROJECT, TAGS, response_id, reward
from agentlightning.store.spans import NewSpan

__all__ = ["JSON", "PROTOBUF", "Unreadable", "parsed", "spans_of", "written"]

PROTOBUF, JSON = "application/x-protobuf", "application/json"
ROLLOUT, ATTEMPT, SEQUENCE = (f"agentlightning.{name}" for name in ("rollout_id", "attempt_id", "span_sequence_id"))
HEADERS = {ROLLOUT: "x-agl-rollout-id", ATTEMPT: "x-agl-attempt-id"}
STATUS_CODES = ("UNSET", "OK", "ERROR")
KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
# OTLP's JSON has these in hexadecimal; protobuf's JSON has bytes in base64.
HEXADECIMAL = ("traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id")
REASON_LIMIT = 300


class Unreadable(ValueError):
    """Raised for a body that does not match its Content-Type, or exceeds a limit; the message is one sentence."""


class TooMany(Unreadable):
    """Raised for a body that would take many times its size in memory."""


TOO_MANY = (
    f"the body has more than {MESSAGES_LIMIT} messages or {ELEMENTS_LIMIT} array elements: send it in several requests"
)
UNREADABLE = "not a valid OTLP span"
ODD_IDS = "a trace_id must have 16 bytes, a span_id 8, and neither may be all zeros"


def parsed(message: Message, body: bytes, content_type: str) -> Counter[str]:
    """Parse a body into an OTLP request, repairing text that is not UTF-8.

    Returns:
        The number of spans left out, by reason.

    Raises:
        Unreadable: the body is not such a request, none of its spans can be read, or it exceeds a limit.
    """
    refused: Counter[str] = Counter()
    try:
        if content_type == PROTOBUF:
            _read_protobuf(message, body)
        elif body:
            refused[UNREADABLE] = _read_json(message, body)
    except TooMany:
        raise
    except (DecodeError, ParseError, msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        # Some messages contain the value, however long it is.
        reason = " ".join(str(error).split())[:REASON_LIMIT]
        raise Unreadable(f"the body is not an OTLP request in {content_type}: {reason}") from error
    except (RecursionError, AttributeError, TypeError) as error:
        # JSON of another shape.
        raise Unreadable(f"the body is not an OTLP request in {content_type}") from error
    return +refused


def _read_protobuf(message: Message, body: bytes) -> None:
    if has_more_in_protobuf(body, message.DESCRIPTOR, MESSAGES_LIMIT, ELEMENTS_LIMIT):
        raise TooMany(TOO_MANY)
    try:
        message.ParseFromString(body)
    except DecodeError:
        message.Clear()
        message.ParseFromString(repair_protobuf(body, message))
        if not _has_any(message):
            raise


def _read_json(message: Message, body: bytes) -> int:
    """Parse JSON; return the number of spans left out because they cannot be read."""
    # In JSON, a message is the value of one field and has at least one.
    if has_more_in_json(body, 2 * MESSAGES_LIMIT):
        raise TooMany(TOO_MANY)
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = msgspec.json.decode(repair_json(body))
    try:
        ParseDict(_fields(found, message.DESCRIPTOR), message, ignore_unknown_fields=True)
        return 0
    except (ParseError, ValueError, RecursionError, AttributeError, TypeError):
        refused = _leave_out(found, _is_unreadable)
        message.Clear()
        ParseDict(_fields(found, message.DESCRIPTOR), message, ignore_unknown_fields=True)
        if not _has_any(message):
            raise
        return refused


def _has_any(request: Any) -> bool:
    """Tell whether a request has a span."""
    return isinstance(request, ExportTraceServiceRequest) and any(
        part.spans for each in request.resource_spans for part in each.scope_spans
    )


def _leave_out(found: Any, is_left_out: Callable[[Any], bool]) -> int:
    """Remove spans from a JSON request; return their number."""
    removed = 0
    for of_resource in found.get("resourceSpans") or found.get("resource_spans") or ():
        for part in of_resource.get("scopeSpans") or of_resource.get("scope_spans") or ():
            spans = part.get("spans") or []
            kept = [span for span in spans if not is_left_out(span)]
            removed += len(spans) - len(kept)
            part["spans"] = kept
    return removed


def _is_unreadable(span: Any) -> bool:
    try:
        ParseDict(_fields(span, Span.DESCRIPTOR), Span(), ignore_unknown_fields=True)
    except (ParseError, ValueError, RecursionError, AttributeError, TypeError):
        return True
    return False


def written(message: Message, content_type: str) -> bytes:
    """Serialize an OTLP answer."""
    return message.SerializeToString() if content_type == PROTOBUF else MessageToJson(message, indent=None).encode()


def spans_of(
    request: ExportTraceServiceRequest, header: Callable[[str], str | None], project_id: str | None = None
) -> tuple[list[NewSpan], int]:
    """Return the spans of a request, and the number left out because of invalid ids (`ODD_IDS`).

    Args:
        header: returns a header of the request; headers name the rollout and attempt of spans that do not.
        project_id: the AgentOps project of the sender, which overrides the project in the spans.

    Raises:
        Unreadable: the request has more events and links than `DETAILS_LIMIT`.
    """
    sent = (span for each in request.resource_spans for part in each.scope_spans for span in part.spans)
    if sum(len(span.events) + len(span.links) for span in sent) > DETAILS_LIMIT:
        raise Unreadable(f"the body has more than {DETAILS_LIMIT} events and links")
    found: list[NewSpan] = []
    refused = 0
    named = {name: header(each) for name, each in HEADERS.items()}
    for of_resource in request.resource_spans:
        attributes = _attributes(of_resource.resource.attributes)
        if project_id is not None:
            attributes[PROJECT] = project_id
        resource = {"attributes": attributes, "schema_url": of_resource.schema_url}
        for of_scope in of_resource.scope_spans:
            scope = {"name": of_scope.scope.name, "version": of_scope.scope.version}
            common = encode({"resource": resource, "scope": scope}) if of_scope.spans else b""
            for span in of_scope.spans:
                if _is_id(span.trace_id, 16) and _is_id(span.span_id, 8):
                    found.append(_span(span, attributes, common, named))
                else:
                    refused += 1
    return found, refused


def _is_id(sent: bytes, length: int) -> bool:
    return len(sent) == length and any(sent)


def _span(span: Any, of_resource: Mapping[str, Any], common: bytes, headers: Mapping[str, str | None]) -> NewSpan:
    """Convert a span.

    Args:
        of_resource: the attributes of its resource.
        common: JSON of its resource and scope, shared with other spans.
    """
    attributes = _attributes(span.attributes)
    rollout_id, attempt_id = _rollout_and_attempt(headers, of_resource, _tags(attributes), attributes)
    trace_id, span_id = span.trace_id.hex(), span.span_id.hex()
    # Some exporters send zeros if there is no parent.
    parent_id = span.parent_span_id.hex() if any(span.parent_span_id) else None
    start_time, end_time = _seconds(span.start_time_unix_nano), _seconds(span.end_time_unix_nano)
    body = {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent_id,
        "name": span.name,
        "status": {
            "status_code": _one_of(STATUS_CODES, span.status.code),
            "description": span.status.message or None,
        },
        "attributes": attributes,
        "events": [
            {
                "name": event.name,
                "attributes": _attributes(event.attributes),
                "timestamp": _seconds(event.time_unix_nano),
            }
            for event in span.events
        ],
        "links": [
            {
                "context": _context(link.trace_id.hex(), link.span_id.hex(), link.trace_state),
                "attributes": _attributes(link.attributes) or None,
            }
            for link in span.links
        ],
        "start_time": start_time,
        "end_time": end_time,
        "context": _context(trace_id, span_id, span.trace_state),
        "parent": None,
        "kind": _one_of(KINDS, span.kind),
    }
    return NewSpan(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=_sequence_id(attributes.get(SEQUENCE, of_resource.get(SEQUENCE))),
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent_id,
        name=span.name,
        start_time=start_time,
        end_time=end_time,
        response_id=response_id(attributes),
        reward=reward(span.name, attributes),
        body=encode(body),
        common=common,
    )


def _rollout_and_attempt(*sources: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the rollout and the attempt that the sources name; later sources override earlier ones."""
    rollout_id = attempt_id = None
    for source in sources:
        if source.get(ROLLOUT) not in (None, rollout_id):
            # An attempt named earlier belongs to another rollout.
            rollout_id, attempt_id = source[ROLLOUT], None
        attempt_id = source.get(ATTEMPT, attempt_id)
    rollout_id = _id(rollout_id)
    return rollout_id, None if rollout_id is None else _id(attempt_id)


def _tags(attributes: Mapping[str, Any]) -> dict[str, str]:
    tags = attributes.get(TAGS)
    pairs = [tag.partition("=") for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else ()
    return {name.strip(): value.strip() for name, _, value in pairs}


def _id(value: Any) -> str | None:
    """Convert an attribute to an id; None if no such id can be looked up."""
    if value is None or isinstance(value, (list, dict)):
        return None
    text = str(value)
    return text if 0 < len(text) <= ID_LIMIT and "\0" not in text else None


def _sequence_id(value: Any) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if abs(number) <= NUMBER_LIMIT else None


def _context(trace_id: str, span_id: str, trace_state: str) -> dict[str, Any]:
    members = (member.partition("=") for member in trace_state.split(",") if "=" in member)
    state = {key.strip(): value.strip() for key, _, value in members}
    return {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": state}


def _seconds(nanoseconds: int) -> float | None:
    return nanoseconds / 1_000_000_000 if nanoseconds else None


def _one_of(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else names[0]


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "int_value":
            return value.int_value
        case "bool_value":
            return value.bool_value
        case "double_value":
            return _double(value.double_value)
        case "array_value":
            return _array(value.array_value.values)
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case "bytes_value":
            return value.bytes_value.hex()
    return None


def _array(values: Any) -> list[Any]:
    # Token ids are long arrays of integers. Anything else reads as 0, and few ids are 0: checking only those is faster
    # than checking the kind of each.
    found = [value.int_value for value in values]
    if 0 not in found:
        return found
    return [number or _value(value) for number, value in zip(found, values, strict=True)]


def _double(number: float) -> float | str:
    # JSON has no such numbers; these are the names that protobuf's JSON uses.
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _fields(found: Any, kind: Any) -> dict[str, Any]:
    """Return the known fields of a JSON message, with ids in base64, as protobuf reads them."""
    if not isinstance(found, dict):
        # Protobuf would look for fields in each character of a string.
        raise Unreadable(f"{kind.name} must be an object")
    known = {}
    for name, value in found.items():
        field = kind.fields_by_camelcase_name.get(name) or kind.fields_by_name.get(name)
        if field is None or value is None:
            continue
        if name in HEXADECIMAL and isinstance(value, str):
            value = _base64(value)
        elif field.message_type is not None and isinstance(value, list):
            value = [_fields(each, field.message_type) for each in value]
        elif field.message_type is not None:
            value = _fields(value, field.message_type)
        known[name] = value
    return known


def _base64(digits: str) -> str:
    try:
        return base64.b64encode(binascii.unhexlify(digits)).decode()
    except (ValueError, binascii.Error) as error:
        raise Unreadable(f"the id {digits[:100]!r} is not hexadecimal") from error
