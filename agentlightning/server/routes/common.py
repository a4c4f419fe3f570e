"""Shared parts of the routes: strict JSON bodies, the database parameter, documented errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute

from agentlightning.server.decoding import has_more_containers, has_more_in_json, header
from agentlightning.server.limits import CONTAINERS_LIMIT, DEPTH_LIMIT, VALUES_LIMIT
from agentlightning.server.transactions import Transactions

__all__ = ["Database", "errors", "media_type", "router", "shown"]

Mend = Callable[[bytes], bytes]

ERROR = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
TOO_DEEP = f"the body is nested more than {DEPTH_LIMIT} deep"
# The HTTP server under the application answers so itself, also to a URL of more than 64 KiB.
NOT_HTTP = {"text/plain": {"schema": {"type": "string"}}}


def media_type(request: Request) -> str:
    """Return the media type of a request's body, in lower case and without parameters; empty if there is none."""
    return (header(request.scope, "content-type") or "").partition(";")[0].strip().lower()


def shown(content_type: str) -> str:
    """Name the media type of a body in an error message."""
    return repr(content_type[:100]) if content_type else "no Content-Type"


class _Request(Request):
    """A request whose JSON body is read strictly, as RFC 8259 defines it.

    Attributes:
        mend: makes JSON of a body that is almost JSON; None where only JSON is accepted.
    """

    mend: Mend | None = None

    def must_be_json(self) -> None:
        content_type = media_type(self)
        kind, _, subtype = content_type.partition("/")
        if kind != "application" or (subtype != "json" and not subtype.endswith("+json")):
            raise HTTPException(415, f"the body must be application/json; this one has {shown(content_type)}")

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self.must_be_json()
            body = await self.body()
            if has_more_in_json(body, VALUES_LIMIT):
                raise HTTPException(400, f"the body has more than {VALUES_LIMIT} values")
            if has_more_containers(body, CONTAINERS_LIMIT):
                raise HTTPException(400, f"the body has more than {CONTAINERS_LIMIT} objects and arrays")
            try:
                self._json = self._decoded(body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise HTTPException(400, f"the body is no JSON: {error}") from error
            except RecursionError as error:
                raise HTTPException(400, TOO_DEEP) from error
            # Few bodies have enough brackets to be nested that deep.
            if body.count(b"[") + body.count(b"{") > DEPTH_LIMIT and _is_too_deep(self._json):
                raise HTTPException(400, TOO_DEEP)
        return self._json

    def _decoded(self, body: bytes) -> Any:
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            if self.mend is None or (mended := self.mend(body)) == body:
                raise
            return msgspec.json.decode(mended)


def _is_too_deep(found: Any) -> bool:
    level = [found]
    for _ in range(DEPTH_LIMIT):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for each in values for value in each if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


class _Route(APIRoute):
    mend: Mend | None = None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            asked = _Request(request.scope, request.receive)
            asked.mend = self.mend
            if request.method in ("GET", "HEAD"):
                return await handle(asked)
            body = await asked.body()
            if self.body_field is not None and body:
                # Otherwise FastAPI would report that the body is not an object.
                asked.must_be_json()
            with request.app.state.body_budget.taken(len(body)):
                return await handle(asked)

        return handle_strictly


def router(tag: str, prefix: str = "/v1/agl", mend: Mend | None = None) -> APIRouter:
    """Make a router for the routes of one noun.

    Args:
        mend: makes JSON of bodies that are almost JSON, and that existing clients send.
    """
    route = type("_Route", (_Route,), {"mend": None if mend is None else staticmethod(mend)})
    return APIRouter(prefix=prefix, route_class=route, tags=[tag])


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error answers for the OpenAPI document: those of every route, and further ones."""
    meant = {
        400: "The body is no JSON, or cannot be unpacked; as text: it is no HTTP, or the URL is too long.",
        401: "The key is missing or wrong.",
        403: "A page of another origin, which is not let ask, would change something.",
        404: "There is none of this id.",
        409: "The rollout has not ended.",
        413: "The body is too large.",
        415: "The body is of a kind, or packed in a way, that is not known.",
        421: "A server without a key was asked by a name that is not the machine's own.",
        429: "More waits for the disk than the server holds; try again after the seconds in Retry-After.",
        422: "Something in the request is not as it has to be.",
        503: "The store cannot be used now; try again after the seconds in Retry-After.",
    }
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": meant[status], **ERROR}
        for status in (400, 401, 403, 413, 415, 421, 422, 503, *statuses)
    }
    found[400] |= {"content": {**ERROR["content"], **NOT_HTTP}}
    return found


async def _transactions(request: Request) -> Transactions:
    return request.app.state.transactions


Database = Annotated[Transactions, Depends(_transactions)]
"""The parameter of a route that uses the store."""
