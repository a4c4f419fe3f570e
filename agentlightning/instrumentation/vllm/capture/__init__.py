"""The capture: each request to the engine is followed to its end, and what it generated is recorded."""
