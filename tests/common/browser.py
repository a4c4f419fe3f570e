"""Chromium, as Debian packages it: where somebody looks at the pages of `agl store`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Request, WebError, expect, sync_playwright

from tests.common.debian import CHROMIUM

MISSING = CHROMIUM.missing
MILLISECONDS = 30_000
"""A safety net: nothing here takes as long."""

Size = Literal["phone", "desktop"]
Scheme = Literal["light", "dark"]

# Nothing is asked of anybody but the server: no updates, no services of Google's. Root may have no sandbox.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SIZES: dict[Size, Any] = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1440, "height": 900}}


def program() -> str | None:
    """The path of the browser that is installed; None where there is none."""
    found = CHROMIUM.find()
    return str(found) if found else None


@contextmanager
def chromium(program: str) -> Iterator[Browser]:
    """A browser without a window, from entering the context to leaving it."""
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program, args=_ARGUMENTS) as found:
        yield found


class Visit:
    """Somebody who has the address of a store: a window, with cookies and passwords of its own.

    Attributes:
        page: what is in the window.
        complaints: what no page may do, and has done: errors of its scripts or in the console, what its policy does not
            let it load, what it asked of another host, and dialogs, which none of ours has.

    Args:
        url: the store's.
        key: what is typed where the browser asks for a user and a password.
        javascript: whether scripts are on.
        timezone: the zone of its clock.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        size: Size = "desktop",
        scheme: Scheme = "light",
        key: str | None = None,
        javascript: bool = True,
        timezone: str = "UTC",
    ) -> None:
        self._url = url
        self.complaints: list[str] = []
        self._context = browser.new_context(
            base_url=url,
            viewport=_SIZES[size],
            color_scheme=scheme,
            http_credentials={"username": "agl", "password": key} if key else None,
            java_script_enabled=javascript,
            locale="en-GB",
            timezone_id=timezone,
        )
        self._context.set_default_timeout(MILLISECONDS)
        self._context.on("console", self._saw_console)
        self._context.on("weberror", self._saw_error)
        self._context.on("request", self._saw_request)
        self._context.on("dialog", self._saw_dialog)
        self.page = self._context.new_page()

    def close(self) -> None:
        """Close the window; idempotent."""
        self._context.close()

    def _saw_console(self, message: ConsoleMessage) -> None:
        url = message.location.get("url", "")
        # That the address that somebody has gone to is not there, the page says itself; and beside JSON, which can name
        # no icon, a browser looks for one here. The words are Chromium's: with others, a test that sees them fails.
        is_known = message.page is not None and url in (message.page.url, f"{self._url}/favicon.ico")
        if message.type == "error" and not (is_known and message.text.startswith("Failed to load")):
            self.complaints.append(f"in the console: {message.text} ({url})")

    def _saw_error(self, error: WebError) -> None:
        self.complaints.append(f"an error of a script: {error.error}")

    def _saw_request(self, request: Request) -> None:
        # What a page has in itself is of no host.
        if not request.url.startswith((f"{self._url}/", "data:", "blob:")):
            self.complaints.append(f"asked another host: {request.url}")

    def _saw_dialog(self, dialog: Dialog) -> None:
        self.complaints.append(f"a dialog: {dialog.message}")
        dialog.dismiss()
