"""ASGI middleware: metrics, permitted origins, API keys, and request bodies."""
