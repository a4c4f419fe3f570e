"""The page at `/`: what is in the store, for people who would rather look than read. It changes nothing.

Each page is a template, whole in itself, and works without a script but for the plot and the keys. htmx asks for the
same page again and puts in what has changed; nothing has a second form as JSON.
"""

from __future__ import annotations

from agentlightning.server.page.routes import routes

__all__ = ["routes"]
