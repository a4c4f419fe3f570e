"""Reading answers: what a client sees, gathered."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.common.vllm import RemoteOpenAIServer

VARYING = {"id", "item_id", "request_id", "created", "created_at", "system_fingerprint"}
"""Fields that differ from call to call, and from server to server."""


@dataclass
class Streamed:
    """A stream put together again, by choice index."""

    chunks: list[dict[str, Any]]
    prompt_token_ids: dict[int, list[int]] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    tool_arguments: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None


def gather(chunks: Iterable[Any]) -> Streamed:
    """Put the chunks of a chat or completions stream of the `openai` client together."""
    streamed = Streamed([chunk.model_dump(exclude_unset=True) for chunk in chunks])
    for chunk in streamed.chunks:
        streamed.usage = chunk.get("usage") or streamed.usage
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            prompt_token_ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")
            if prompt_token_ids:
                assert index not in streamed.prompt_token_ids, "prompt ids came twice"
                streamed.prompt_token_ids[index] = prompt_token_ids
            streamed.token_ids.setdefault(index, []).extend(choice.get("token_ids") or [])
            _append(streamed.text, index, choice.get("text") or delta.get("content"))
            _append(streamed.reasoning, index, delta.get("reasoning"))
            for call in delta.get("tool_calls") or []:
                _append(streamed.tool_arguments, index, call["function"].get("arguments"))
    return streamed


def _append(texts: dict[int, str], index: int, text: str | None) -> None:
    texts[index] = texts.get(index, "") + (text or "")


def post(server: RemoteOpenAIServer, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Any:
    """The JSON answer to a request that no client library has touched; a list of events where it is a stream."""
    return _answer(server, path, json.dumps(body).encode(), headers or {})


def fetch(server: RemoteOpenAIServer, path: str) -> Any:
    """The same for what is fetched."""
    return _answer(server, path, None, {})


def _answer(server: RemoteOpenAIServer, path: str, body: bytes | None, more: Mapping[str, str]) -> Any:
    # The key of servers that have one; others do not look at it.
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none", **more}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", body, headers), timeout=120) as response:
        text = response.read().decode()
        if response.headers.get_content_type() != "text/event-stream":
            return json.loads(text)
    # Not splitlines(): a model that says U+2028 or U+0085 begins no new line.
    data = [line.removeprefix("data: ").rstrip("\r") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(event) for event in data if event != "[DONE]"]


def get(server: RemoteOpenAIServer, path: str, **headers: str) -> tuple[int, bytes]:
    """The status and the body of the answer to a GET of exactly this path: no client tidies it up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


GROWING = {"content", "text", "reasoning", "arguments"}
"""Fields that a client joins from chunk to chunk."""


DELTAS = {"response.output_text.delta", "content_block_delta"}
"""The events that grow a text."""


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one answer, its choices by index: where it is cut into chunks depends on how busy the machine is."""
    answer: dict[str, Any] = {}
    for event in events:
        choices = {choice["index"]: choice for choice in event["choices"]}
        answer = _merge(answer, {**event, "choices": choices})
    return answer


def _merge(earlier: Any, later: Any, key: Any = None) -> Any:
    if key == "tool_calls" and isinstance(later, list):
        later = {call["index"]: call for call in later}
    if earlier is None or later is None:
        return later if earlier is None else earlier
    if isinstance(later, dict):
        return {name: _merge(earlier.get(name), later.get(name), name) for name in {**earlier, **later}}
    if isinstance(later, list) or key in GROWING:
        return earlier + later
    return later


def joined_events(answer: Any) -> Any:
    """The same for the events of Responses and Messages: their deltas as one text, before the others."""
    if not isinstance(answer, list):
        return answer
    deltas = [event["delta"] for event in answer if event["type"] in DELTAS]
    text = "".join(delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas)
    whole = [event for event in answer if event["type"] not in DELTAS]
    # They are counted through, deltas too.
    return [text, *({key: value for key, value in event.items() if key != "sequence_number"} for event in whole)]


def steady(answer: Any) -> Any:
    """The answer without what differs from call to call."""
    if isinstance(answer, dict):
        return {key: steady(value) for key, value in answer.items() if key not in VARYING}
    return [steady(item) for item in answer] if isinstance(answer, list) else answer


def tokenize(server: RemoteOpenAIServer, **prompt: Any) -> list[int]:
    """The ids that vLLM itself makes of `prompt=...` or `messages=[...]`."""
    return post(server, "/tokenize", {"model": server.model, **prompt})["tokens"]
