"""Send spans with OpenTelemetry's SDK, of the version that runs this, and print what was sent, as JSON.

Arguments: the store's URL, the compression, the agent's rollout and attempt, and the rollout of one span.
"""

from __future__ import annotations

import json
import sys

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.version import __version__
from opentelemetry.trace import (
    Link,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

TOKEN_IDS = [number % 5 * 30_000 for number in range(1024)]
"""Token ids with zeros among them, which protobuf does not distinguish from values that are not numbers."""
ATTRIBUTES = {
    "text": "ünïcode 🦙",
    "yes": True,
    "no": False,
    "number": -(2**63),
    "zero": 0,
    "fraction": 0.1,
    "whole": 2.0,
    "texts": ["a", "", "c"],
    "switches": [True, False],
    "fractions": [0.0, 1.5, -2.0],
    "nothing": [],
    "response_token_ids": TOKEN_IDS,
}
LINKED = (0xABCD << 64, 0xEF)


def main(url: str, compression: str, rollout_id: str, attempt_id: str, other_rollout_id: str) -> None:
    exporter = OTLPSpanExporter(f"{url}/v1/traces", compression=Compression(compression))
    resource = Resource.create(
        {"service.name": "agent", "agentlightning.rollout_id": rollout_id, "agentlightning.attempt_id": attempt_id}
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("tests", "1.2.3")
    with tracer.start_as_current_span("agent") as agent:
        linked = SpanContext(*LINKED, is_remote=True, trace_flags=TraceFlags(1))
        chat = tracer.start_span(
            "chat", set_span_in_context(agent), attributes=ATTRIBUTES, links=[Link(linked, {"why": "retry"})]
        )
        chat.add_event("first token", {"index": 0}, timestamp=1_700_000_000_250_000_000)
        chat.set_status(Status(StatusCode.ERROR, "cut off"))
        chat.end()
    with tracer.start_as_current_span("numbered", attributes={"agentlightning.span_sequence_id": 40}):
        pass
    with tracer.start_as_current_span("of another", attributes={"agentlightning.rollout_id": other_rollout_id}):
        pass
    assert provider.force_flush()
    # Once more, as after a lost answer.
    again = SimpleSpanProcessor(exporter)
    if isinstance(chat, ReadableSpan):
        again.on_end(chat)
    provider.shutdown()
    context = chat.get_span_context()
    sent = {
        "version": __version__,
        "trace_id": format_trace_id(context.trace_id),
        "span_id": format_span_id(context.span_id),
        "parent_id": format_span_id(agent.get_span_context().span_id),
        "start_time": chat.start_time if isinstance(chat, ReadableSpan) else None,
        "end_time": chat.end_time if isinstance(chat, ReadableSpan) else None,
    }
    sys.stdout.write(json.dumps(sent))


if __name__ == "__main__":
    main(*sys.argv[1:])
