"""Errors as pages, for requests that a browser makes to show them."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentlightning.server.page.rendering import page
from agentlightning.store.wire import ERROR_HEADER

__all__ = ["ErrorPageMiddleware"]


class ErrorPageMiddleware:
    """Answer a browser with a page where a program would get the sentence of `errors.sentence`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_browser = scope["type"] == "http" and "text/html" in Headers(scope=scope).get("accept", "")
        if not is_browser or scope["method"] not in ("GET", "POST"):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def replace(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_sentence(message):
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    await _page(Request(scope), start, json.loads(body)["detail"])(scope, receive, send)

        await self._app(scope, receive, replace)


def _is_sentence(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return ERROR_HEADER in headers and headers.get("content-type") == "application/json"


def _page(request: Request, start: Message, detail: str) -> ASGIApp:
    status = HTTPStatus(start["status"])
    # Without the key, a browser would get no script and no stylesheet either.
    template = "unauthorized.html" if status == HTTPStatus.UNAUTHORIZED else "error.html"
    answer = page(request, template, status, title=status.phrase, text=f"{detail[:1].upper()}{detail[1:]}.")
    sent = MutableHeaders(raw=answer.raw_headers)
    for name, value in Headers(raw=start["headers"]).items():
        sent.setdefault(name, value)
    return answer
