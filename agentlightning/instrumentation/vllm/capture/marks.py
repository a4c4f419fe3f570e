"""Marks decide which process records a request to the engine: the first instrumented one that sees it.

An instrumented API server, gRPC server or offline `LLM` marks each request that it sends to an engine core. The engine
core records the requests without a mark: those of the Rust frontend, and of frontends on other machines that are not
instrumented. So each request is recorded exactly once, wherever the two sides run.

A mark travels beside the request and never in it, since a user's logits processors, schedulers and connectors read
everything that a request has. Between processes it is one more frame after those of vLLM's message: vLLM finds frames
by their number, so an engine core that is not instrumented never looks at it. Within a process it waits in a table
here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["MESSAGE_PATCHES", "Mark", "add", "take"]


class Mark(Enum):
    """A message of a request's sender to the engine core; the value is the frame."""

    RECORDED = b"agentlightning: recorded"
    RECORDED_WITH_LOGPROBS = b"agentlightning: recorded with logprobs"
    """The request asks for logprobs that only the recording wants."""


_BY_FRAME = {mark.value: mark for mark in Mark}
_LONGEST = max(map(len, _BY_FRAME))

# Requests in transit: from an output processor to an encoder, or from a decoder to a scheduler. Each is removed within
# moments, unless vLLM refuses the request in between (a grammar that does not compile): the oldest go when there are
# too many.
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


def wrap_encode(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackEncoder.encode`, with which a frontend sends a request to an engine core."""

    def encode_with_mark(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        frames = encode(self, obj, *args, **kwargs)
        mark = contained("marking a request", take, getattr(obj, "request_id", "")) if _marks else None
        return frames if mark is None else [*frames, mark.value]

    return encode_with_mark


def wrap_decoder_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MsgpackDecoder.__init__`: only an engine core's decoder of requests looks for marks.

    A frontend decodes outputs for every token, and is spared the call.
    """

    def init_and_read_marks(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        contained("preparing to read marks", _read_marks, self, *args, **kwargs)

    return init_and_read_marks


def _read_marks(decoder: Any, t: Any = None, *_: Any, **__: Any) -> None:
    """Have a decoder of requests read their marks; `t` is what it decodes, as vLLM names the parameter."""
    if getattr(t, "__name__", None) == "EngineCoreRequest":
        decoder.decode = functools.partial(_decode_and_read, decoder.decode)


def _decode_and_read(decode: Callable[..., Any], bufs: Any, *args: Any, **kwargs: Any) -> Any:
    request = decode(bufs, *args, **kwargs)
    # Without a mark it has one frame, unless there are tensors in it.
    if isinstance(bufs, list) and len(bufs) > 1:
        contained("reading the mark of a request", _read, bufs[-1], request.request_id)
    return request


def _read(frame: Any, request_id: str) -> None:
    """Note the mark in a message's last frame, if it is one; it may also be a tensor of any size."""
    content = memoryview(frame)
    if content.nbytes <= _LONGEST and (mark := _BY_FRAME.get(bytes(content))):
        add(request_id, mark)


def _records(module: ModuleType) -> bool:
    return session.is_recording


MESSAGE_PATCHES: tuple[Patch, ...] = (
    Where(_records, Wrap("MsgpackEncoder.encode", ("obj",), wrap_encode)),
    Where(_records, Wrap("MsgpackDecoder.__init__", ("t",), wrap_decoder_init)),
)
