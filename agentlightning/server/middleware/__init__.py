"""ASGI middleware: HEAD, metrics, permitted origins, API keys, and request bodies."""
