"""What is answered where something is wrong: JSON with one sentence, `{"detail": "..."}`."""

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

from agentlightning.errors import InvalidRecord, NotFound, StoreRefused, StoreUnavailable
from agentlightning.server.transactions import Busy
from agentlightning.store.wire import ERROR_HEADER, NOT_FOUND

__all__ = ["add_handlers", "sentence", "what_is_wrong"]

ERRORS_SHOWN = 3

logger = logging.getLogger("agentlightning.store")


def sentence(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer, by which a client knows that no proxy said it."""
    said = msgspec.json.encode({"detail": detail})
    return Response(said, status, {ERROR_HEADER: "1", **(headers or {})}, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Make such an answer of every exception that a route may raise."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(StoreUnavailable, _unavailable)
    app.add_exception_handler(StoreRefused, _unavailable)
    app.add_exception_handler(InvalidRecord, _invalid_record)
    app.add_exception_handler(Exception, _unexpected)


def what_is_wrong(error: RequestValidationError | ValidationError) -> str:
    """The first few of pydantic's complaints, each with where it is."""
    found = error.errors()
    told = [_complaint(each) for each in found[:ERRORS_SHOWN]]
    if len(found) > ERRORS_SHOWN:
        told.append(f"and {len(found) - ERRORS_SHOWN} more")
    return "; ".join(told)


def _complaint(error: Any) -> str:
    where = ".".join(str(part)[:100] for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]


async def _http(request: Request, error: Any) -> Response:
    match error.status_code:
        case 404:
            return sentence(404, "there is no such route: /openapi.json has all")
        case 405:
            # Each method has a route of its own, and Starlette knows of the first alone.
            allowed = ", ".join(sorted(_methods(request))) or error.headers["Allow"]
            return sentence(
                405, f"{request.method} is none of the methods of this route: {allowed}", {"Allow": allowed}
            )
    return sentence(error.status_code, str(error.detail), error.headers)


def _methods(request: Request) -> set[str]:
    matching = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
    # `search` and `latest` are ids, too, to the routes after theirs.
    return {method for route in matching if route.path == matching[0].path for method in route.methods}


async def _invalid(_: Request, error: Any) -> Response:
    return sentence(422, what_is_wrong(error))


async def _not_found(_: Request, error: Any) -> Response:
    return sentence(404, str(error), {ERROR_HEADER: NOT_FOUND})


async def _busy(request: Request, error: Exception) -> Response:
    # The client of Agent Lightning 0.3 takes a 429 for good (as read): it is for routes that have it in the document.
    if 429 in request.scope["route"].responses:
        return sentence(429, str(error), {"Retry-After": "1"})
    return await _unavailable(request, error)


async def _unavailable(_: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return sentence(503, str(error), {"Retry-After": "1"})


async def _invalid_record(request: Request, error: Exception) -> Response:
    logger.info("%s %s: %s", request.method, request.url.path, error)
    return sentence(422, f"something in it cannot be stored: {error}")


async def _unexpected(_: Request, error: Exception) -> Response:
    # What it was is in the log, with its traceback: that is nothing for those who call.
    return sentence(500, f"the store has a bug, which its log tells about ({type(error).__name__})")
