"""Web pages at `/` that show what is in the store, and change nothing.

Each page is a complete template, and works without scripts except for the plot and the keys. htmx requests the same
page again and swaps in what has changed; nothing has a second form as JSON.
"""

from __future__ import annotations

from agentlightning.server.page.routes import routes

__all__ = ["routes"]
