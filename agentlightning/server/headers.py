"""Headers as text: UTF-8, which is what agents send, or else Latin-1, which is what ASGI takes them for."""

from __future__ import annotations

from starlette.types import Scope

__all__ = ["header"]


def header(scope: Scope, name: str) -> str | None:
    """The first header of this name, which is in lower case; None if the request has none."""
    wanted = name.encode()
    for each, value in scope["headers"]:
        if each == wanted:
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.decode("latin-1")
    return None
