"""Templates, and the format of numbers and times in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup, escape

import agentlightning

__all__ = ["STATIC", "address_of", "exact", "number", "own_address", "page", "seconds", "short"]

_HERE = Path(__file__).parent
STATIC = _HERE / "static"

HEADERS = {
    # Only scripts and styles that the store itself serves, and none inline.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # To other servers no referrer; without one to this server, a browser would not say which page sends a form.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

MINUTE, HOUR = 60, 3600
THOUSAND = 1_000
REWARD_DIGITS = 4


def page(request: Request, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """Render a template with these values.

    Addresses on the page are relative, so that it works behind a proxy that serves it below another path. If that path
    is known they begin with it, so that the page also works there without a slash at its end.
    """
    path, root = request.scope["path"], _root(request)
    has_sessions = hasattr(request.app.state, "clients")
    text = _environment.get_template(template).render(**values, path=path, root=root, has_sessions=has_sessions)
    # Unpaired surrogates cannot be encoded.
    return HTMLResponse(text.encode("utf-8", "replace"), status, HEADERS)


def address_of(request: Request, path: str, **query: object) -> str:
    """Return the relative address of a path of the server with a query, for an answer to this request."""
    return _address(_root(request), path, query)


def own_address(request: Request) -> str:
    """Return the whole address of the store, as the reader's browser has it."""
    return str(request.base_url).rstrip("/")


def _root(request: Request) -> str:
    path, root_path = request.scope["path"], request.scope.get("root_path", "")
    return f"{root_path}/" if root_path else "../" * (path.count("/") - 1) or "./"


def number(value: int) -> str:
    """Separate thousands with a thin space, which is right in every language."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def short(value: float) -> str:
    """Format an amount with three digits, in thousands, millions or billions."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return number(round(value))


def exact(value: float) -> str:
    """Format a mean with three digits, and all digits before the point."""
    return f"{value:.3g}" if abs(value) < THOUSAND else number(round(value))


def _iso(at: float) -> str:
    """Format seconds since the epoch for a program, as UTC."""
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%dT%H:%MZ}"


def _timestamp(seconds: float | None) -> Markup:
    """Format seconds since the epoch as UTC; `page.js` makes local time of it, and shows UTC on hover."""
    if seconds is None:
        return Markup('<span class="none">\N{EN DASH}</span>')
    with suppress(ValueError, OverflowError, OSError):
        at = datetime.fromtimestamp(seconds, timezone.utc)
        return Markup('<time datetime="{}">{}</time>').format(
            at.isoformat(timespec="milliseconds"), f"{at:%Y-%m-%d\N{NO-BREAK SPACE}%H:%M:%S}\N{NO-BREAK SPACE}UTC"
        )
    # Beyond the years that a calendar has.
    return escape(f"{seconds} s")


def seconds(value: float | None) -> str:
    """Format a duration, as precisely as matters."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    space = "\N{NO-BREAK SPACE}"
    if value < 1:
        return f"{value * 1000:.0f}{space}ms"
    if value < MINUTE:
        return f"{value:.1f}{space}s"
    if value < HOUR:
        return f"{int(value // MINUTE)}{space}min {int(value % MINUTE)}{space}s"
    return f"{int(value // HOUR)}{space}h {int(value % HOUR // MINUTE)}{space}min"


def _reward(value: float | None) -> Markup:
    """Format a reward with four digits, and all digits before the point; the exact value is shown on hover."""
    if value is None:
        return Markup("\N{EN DASH}")
    digits = REWARD_DIGITS - 1 - math.floor(math.log10(abs(value))) if value else 0
    rounded = round(value, max(digits, 0))
    shown = f"{rounded:.15g}"
    if rounded == value:
        return escape(shown)
    return Markup('<data value="{}" title="{}">{}</data>').format(repr(value), repr(value), shown)


@pass_context
def _link(context: Context, path: str, **query: object) -> str:
    """Return the relative address of a path of the server with a query, without parameters that are None."""
    return _address(context["root"], path, query)


def _address(root: str, path: str, query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    whole = root + path.removeprefix("/")
    return f"{whole}?{urlencode(given, doseq=True, errors='replace')}" if given else whole


@pass_context
def _file(context: Context, name: str) -> str:
    """Return the relative address of a script or stylesheet, different in each release."""
    return f"{context['root']}page/{agentlightning.__version__}/{name}"


def _create_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "timestamp": _timestamp,
        "seconds": seconds,
        "reward": _reward,
        "short": short,
        "iso": _iso,
    }
    environment.filters |= filters
    environment.globals |= {"link": _link, "file": _file}
    return environment


_environment = _create_environment()
