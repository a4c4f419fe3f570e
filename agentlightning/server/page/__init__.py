"""Web pages at `/` that show what is in the store, and take rewards and notes from people.

Each page is a complete template, and works without scripts except for the plot, the keys and copying. htmx requests the
same page again and swaps in what has changed, and loads long parts when they are unfolded; nothing has a second form as
JSON.
"""

from __future__ import annotations

from agentlightning.server.page.routes import routes

__all__ = ["routes"]
