"""HTTP on a store: the LightningStore interface of Agent Lightning 0.3, and OpenTelemetry's."""

from agentlightning.server.app import create_app

__all__ = ["create_app"]
