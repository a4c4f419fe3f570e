"""HTTP server on a store: the LightningStore interface of Agent Lightning 0.3, OTLP, AgentOps, and web pages."""

from agentlightning.server.app import create_app

__all__ = ["create_app"]
