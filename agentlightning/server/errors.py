"""Answers to requests that fail: JSON with one sentence, `{"detail": "..."}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from agentlightning.errors import (
    InvalidRecord,
    NotFound,
    RolloutTooLarge,
    RolloutUnderWay,
    StoreRefused,
    StoreUnavailable,
)
from agentlightning.server.transactions import Busy
from agentlightning.store.wire import ERROR_HEADER, NOT_FOUND, TOO_LARGE

__all__ = ["add_handlers", "sentence", "validation_message"]

ERRORS_SHOWN = 3

logger = logging.getLogger("agentlightning.store")


def sentence(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return such an answer, with a header that tells it from a proxy's."""
    body = msgspec.json.encode({"detail": detail})
    return Response(body, status, {ERROR_HEADER: "1", **(headers or {})}, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Answer every exception that a route may raise with such a sentence."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(RolloutUnderWay, _under_way)
    app.add_exception_handler(RolloutTooLarge, _too_large)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(StoreUnavailable, _unavailable)
    app.add_exception_handler(StoreRefused, _unavailable)
    app.add_exception_handler(InvalidRecord, _invalid_record)
    app.add_exception_handler(Exception, _unexpected)


def validation_message(error: RequestValidationError | ValidationError) -> str:
    """Return the first few of pydantic's complaints, each with the field that it is about."""
    found = error.errors()
    messages = [_complaint(each) for each in found[:ERRORS_SHOWN]]
    if len(found) > ERRORS_SHOWN:
        messages.append(f"and {len(found) - ERRORS_SHOWN} more")
    return "; ".join(messages)


def _complaint(error: Any) -> str:
    where = ".".join(str(part)[:100] for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]


async def _http(request: Request, error: Any) -> Response:
    match error.status_code:
        case 404:
            return sentence(404, "there is no such route: /docs and /openapi.json list all")
        case 405:
            # Each method has a route of its own, and Starlette reports only the first.
            allowed = ", ".join(sorted(_methods(request))) or error.headers["Allow"]
            return sentence(405, f"this route does not support {request.method}, only {allowed}", {"Allow": allowed})
    return sentence(error.status_code, str(error.detail), error.headers)


def _methods(request: Request) -> set[str]:
    matching = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
    # To the routes after theirs, `search` and `latest` are ids.
    found = {method for route in matching if route.path == matching[0].path for method in route.methods}
    return found | ({"HEAD"} if "GET" in found else set())


async def _invalid(_: Request, error: Any) -> Response:
    return sentence(422, validation_message(error))


async def _not_found(_: Request, error: Any) -> Response:
    return sentence(404, str(error), {ERROR_HEADER: NOT_FOUND})


async def _under_way(_: Request, error: Any) -> Response:
    return sentence(409, str(error))


async def _too_large(_: Request, error: Any) -> Response:
    return sentence(422, str(error), {ERROR_HEADER: TOO_LARGE})


async def _busy(request: Request, error: Exception) -> Response:
    # The client of Agent Lightning 0.3 never retries a 429 (from its source): only routes that document it send it.
    if 429 in request.scope["route"].responses:
        return sentence(429, str(error), {"Retry-After": "1"})
    return await _unavailable(request, error)


async def _unavailable(_: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return sentence(503, str(error), {"Retry-After": "1"})


async def _invalid_record(request: Request, error: Exception) -> Response:
    logger.info("%s %s: %s", request.method, request.url.path, error)
    return sentence(422, f"the store cannot keep a value in this request: {error}")


async def _unexpected(_: Request, error: Exception) -> Response:
    # The log has the traceback, which is not for clients.
    return sentence(500, f"the store has a bug ({type(error).__name__}): its log has the traceback")
