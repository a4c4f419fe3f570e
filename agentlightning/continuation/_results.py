"""Results of a request that may continue a call, each with its reason."""

from __future__ import annotations

__all__ = [
    "CONTINUED",
    "CONTINUED_EARLIER",
    "ELSEWHERE",
    "FIRST_CALL",
    "NOT_APPEND_ONLY",
    "NOT_TEXT",
    "NO_MATCH",
    "OTHER_OPTIONS",
    "OTHER_REQUEST",
    "PARSER",
    "REASONING_DROPPED",
    "RESULTS",
    "SEAM",
    "STORE_NOT_AVAILABLE",
    "TOO_LONG",
]

CONTINUED = "continued"
CONTINUED_EARLIER = "continued from an earlier call"
FIRST_CALL = "first call"
NO_MATCH = "no match"
OTHER_OPTIONS = "other tools or options"
ELSEWHERE = "elsewhere"
STORE_NOT_AVAILABLE = "store not available"
NOT_APPEND_ONLY = "template not append-only"
REASONING_DROPPED = "reasoning dropped"
SEAM = "seam"
TOO_LONG = "too long"
NOT_TEXT = "not text"
PARSER = "reasoning parser"
OTHER_REQUEST = "other request"

RESULTS = {
    CONTINUED: "the prompt goes on from the exact ids of an earlier call",
    CONTINUED_EARLIER: "the prompt goes on from a call whose answer is not the last in the request: that is not known",
    FIRST_CALL: "the request has no answer in it",
    NO_MATCH: "no call of this rollout had these messages and this answer",
    OTHER_OPTIONS: "the call with these messages had other tools, another model or other template options",
    ELSEWHERE: "this server knows no call of this rollout, or no longer, and found none in the store in time",
    STORE_NOT_AVAILABLE: "this server knows no call of this rollout, and the store did not answer in time, or failed",
    NOT_APPEND_ONLY: "the chat template writes what came before in another way once something follows",
    REASONING_DROPPED: "the chat template leaves out the reasoning that the model wrote",
    SEAM: "the answer does not end with the token that ends a turn in the template",
    TOO_LONG: "the exact ids leave no place for an answer in what the model takes",
    NOT_TEXT: "the messages are not only text",
    PARSER: "the reasoning parser would take earlier reasoning in the exact ids for that of this answer",
    OTHER_REQUEST: "an option of the request needs vLLM's own prompt",
}
"""Results of a request, each with its reason."""
