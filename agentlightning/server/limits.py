"""Limits of the server, which protect it from requests that would cost too much."""

from __future__ import annotations

__all__ = [
    "ARRIVING_LIMIT",
    "BATCH_LIMIT",
    "CONTAINERS_LIMIT",
    "DEPTH_LIMIT",
    "DEQUEUE_LIMIT",
    "DETAILS_LIMIT",
    "ELEMENTS_LIMIT",
    "ID_LIMIT",
    "MESSAGES_LIMIT",
    "NUMBER_LIMIT",
    "PAGE_LIMIT",
    "UNAUTHENTICATED_LIMIT",
    "VALUES_LIMIT",
    "WAITING_LIMIT",
]

BATCH_LIMIT = 10_000
"""Rollouts in one request to enqueue them or to wait for them; generations in one request."""
DEQUEUE_LIMIT = 1_000
"""Rollouts in one request to dequeue them."""
DETAILS_LIMIT = 100_000
"""Events and links of all spans in one OTLP request. An empty one is two bytes on the wire, and much more in memory."""
PAGE_LIMIT = 10_000
"""Items on a page with a limit. A page without one is streamed."""
CONTAINERS_LIMIT = 500_000
"""Objects and arrays in a JSON body. One of two bytes takes a hundred in memory, and an object with one field 240."""
DEPTH_LIMIT = 200
"""Nesting of arrays and objects in a JSON body. Readers have limits as well: Python's is near 1,000."""
ID_LIMIT = 512
"""Characters of an id or a name that can be looked up."""
MESSAGES_LIMIT = 500_000
"""Messages at any depth in one OTLP request, not counting elements of arrays. An attribute is two messages."""
ELEMENTS_LIMIT = 2_000_000
"""Elements of arrays, such as token ids, in one OTLP request."""
VALUES_LIMIT = 4_000_000
"""Elements of arrays and fields of objects in any other JSON body."""
NUMBER_LIMIT = 2**53 - 1
"""The highest integer that every JSON reader can tell from the next one."""
UNAUTHENTICATED_LIMIT = 64 << 10
"""Bytes of a body on the routes that need no key."""
WAITING_LIMIT = 256 << 20
"""Bytes of all bodies that wait for the disk."""
ARRIVING_LIMIT = 256 << 20
"""Bytes of all bodies that are still arriving, without the first `UNCOUNTED` bytes of each."""
