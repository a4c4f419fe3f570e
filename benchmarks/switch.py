"""One server process, instrumented and not in turns: `vllm serve --middleware benchmarks.switch.Switch`.

Two processes of the same program differ by more than what is measured: by where things lie in their memory. One that
is patched, and of which every patch is taken off again, is the same process both times.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import import_module
from typing import Any

from agentlightning.instrumentation.vllm import _releases, instrument_vllm, uninstrument_vllm
from agentlightning.instrumentation.vllm._context import App, RequestContextMiddleware
from agentlightning.instrumentation.vllm.capture import frontend, marks
from agentlightning.patching import PatchSet, Wrap

__all__ = ["ROUTE", "Switch", "answer"]

ROUTE = "/instrumented/"
"""The route ends in `off`, `on`, `logprobs` (on, with `AGL_LOGPROBS`), `unmasked` (on, as if vLLM gave no sampling
masks), or `marked`: off, but requests are marked, since the engine core, which is instrumented, would record those
without a mark.
"""


def marking(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OutputProcessor.add_request`."""

    def add_request_and_mark(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = add_request(self, request, *args, **kwargs)
        marks.add(request.request_id, marks.Mark.RECORDED)
        return answer

    return add_request_and_mark


MARKING = (
    PatchSet(
        "marks", _releases.OUTPUT_PROCESSOR.modules, (Wrap("OutputProcessor.add_request", ("request",), marking),)
    ),
    PatchSet("messages", _releases.ENGINE_MESSAGES.modules, marks.MESSAGE_PATCHES),
)


_MASKS = frontend._masks


def _no_masks(state: Any) -> list[Any]:
    return []


class Switch:
    """Turns the instrumentation on and off for all requests that come after."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._vllms_stack: App | None = None

    def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"].startswith(ROUTE):
            return self._turn(scope["app"], scope["path"].removeprefix(ROUTE), send)
        return self._app(scope, receive, send)

    async def _turn(self, app: Any, position: str, send: Any) -> None:
        on = position in ("on", "logprobs", "unmasked")
        # Read when the patches are put on.
        os.environ["AGL_LOGPROBS"] = "on" if position == "logprobs" else "off"
        frontend._masks = _no_masks if position == "unmasked" else _MASKS
        self.put(app, on)
        if position == "marked":
            for patch_set in MARKING:
                patch_set.apply(import_module(patch_set.modules[0]))
        await answer(send)

    def put(self, app: Any, on: bool) -> None:
        """Put the patches on, or take them off."""
        stack = self._vllms_stack or app.middleware_stack
        # As it is without us, who may have been there from the start.
        stack = self._vllms_stack = stack.app if isinstance(stack, RequestContextMiddleware) else stack
        # On or off, what was on is taken off: one turn is as much work as another.
        for patch_set in MARKING:
            patch_set.undo()
        uninstrument_vllm()
        if on:
            instrument_vllm()
        # What is put on when a server starts.
        app.middleware_stack = RequestContextMiddleware(stack) if on else stack


async def answer(send: Any) -> None:
    """Answer a request for a turn."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
