"""Marks that decide which process records a request to the engine: the first instrumented one that sees it.

An instrumented API server, gRPC server or offline `LLM` marks each request that it sends to an engine core, and the
engine core records the requests without a mark: those of the Rust frontend, and of frontends on other machines that are
not instrumented. So nothing is recorded twice, wherever the two sides run, and nothing is left out.

A mark travels beside the request and never in it, since logits processors, schedulers and connectors of the user's read
whatever a request has. Between processes it is one more frame behind those of vLLM's message: vLLM finds frames by
their number, so an engine core that is not instrumented never looks at it. Within a process it stays in a table here.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["MESSAGE_PATCHES", "Mark", "add", "take"]


class Mark(Enum):
    """A message from the sender of a request to the engine core; the value is its frame."""

    RECORDED = b"agentlightning: recorded"
    RECORDED_WITH_LOGPROBS = b"agentlightning: recorded with logprobs"
    """Only the recording wants the logprobs that the request asks for."""


_BY_FRAME = {mark.value: mark for mark in Mark}
_LONGEST = max(map(len, _BY_FRAME))

# Requests on their way: from an output processor to an encoder, or from a decoder to a scheduler. Each is taken out
# within moments, except where vLLM refuses a request in between (a grammar that does not compile): those go when there
# are too many.
_marks: dict[str, Mark] = {}
_MOST = 1 << 16


def add(request_id: str, mark: Mark) -> None:
    """Mark a request that is about to be sent to an engine core.

    Args:
        request_id: the engine's id for it.
    """
    _marks[request_id] = mark
    if len(_marks) > _MOST:
        _marks.pop(next(iter(_marks)), None)


def take(request_id: str) -> Mark | None:
    """Remove the mark of a request that has arrived, and return it; None if no instrumented process sent it."""
    return _marks.pop(request_id, None)


def sending(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackEncoder.encode`, with which a frontend sends a request to an engine core."""

    def encode_with_mark(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        frames = encode(self, obj, *args, **kwargs)
        mark = contained("marking a request", take, getattr(obj, "request_id", "")) if _marks else None
        return frames if mark is None else [*frames, mark.value]

    return encode_with_mark


def receiving(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackDecoder.decode`, with which an engine core reads a request."""

    def decode_with_mark(self: Any, bufs: Any, *args: Any, **kwargs: Any) -> Any:
        message = decode(self, bufs, *args, **kwargs)
        # Most messages have one frame.
        if isinstance(bufs, list) and len(bufs) > 1 and hasattr(message, "request_id"):
            contained("reading the mark of a request", _read, bufs[-1], message.request_id)
        return message

    return decode_with_mark


def _read(frame: Any, request_id: str) -> None:
    """Note the mark that a message's last frame may be; it may as well be a tensor of any size."""
    content = memoryview(frame)
    if content.nbytes <= _LONGEST and (mark := _BY_FRAME.get(bytes(content))):
        add(request_id, mark)


def _records(module: ModuleType) -> bool:
    return session.is_on()


MESSAGE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("MsgpackEncoder.encode", ("obj",), sending)),
    Where(_records, Wrap("MsgpackDecoder.decode", ("bufs",), receiving)),
)
