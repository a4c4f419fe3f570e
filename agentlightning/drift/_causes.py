"""The causes of breaks: their names, what they mean, and what ends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

__all__ = ["ABOUT", "CAUSES", "MEANT", "Cause"]

Cause = Literal[
    "retokenised",
    "reasoning",
    "tool_call",
    "template",
    "answer_end",
    "header",
    "tools",
    "foreign",
    "other",
    "compaction",
    "sub_agent",
    "retry",
]
"""Causes why a prompt is not what the model saw and said before."""
CAUSES: tuple[Cause, ...] = get_args(Cause)

MEANT: frozenset[Cause] = frozenset(("compaction", "sub_agent", "retry"))
"""Causes that an agent means: counted, but no drift."""


class About(NamedTuple):
    """A cause in a few words, and what ends it in a sentence."""

    title: str
    cure: str


ABOUT: Mapping[Cause, About] = {
    "retokenised": About(
        "same text, other ids",
        "Sampled ids are not those that the tokenizer makes of their text: send ids back instead of text "
        "(completions take prompts of ids), or keep such rows apart, as `drift=fork` does.",
    ),
    "reasoning": About(
        "reasoning left out of the history",
        "The template drops earlier reasoning: use one that keeps it (`vllm serve --chat-template FILE`), let the "
        "agent send it back, or train each call as a row (`drift=transition`).",
    ),
    "tool_call": About(
        "tool call written anew",
        "The template writes a tool call in its own way: make its white space and JSON those that the model writes "
        "(`vllm serve --chat-template FILE`), and let the agent send arguments back unparsed.",
    ),
    "template": About(
        "other special tokens, or another order",
        "The template renders a history in another way than it rendered the prompt: give one whose history is what it "
        "wrote before, with tools in front of the messages (`vllm serve --chat-template FILE`).",
    ),
    "answer_end": About(
        "white space, stop token or stop string at an answer's end",
        "The template trims answers or ends them with another token than the model: remove its `trim`, and stop on the "
        "token that it writes (`stop_token_ids`, `generation_config.json`). Strings in `stop` are sampled, but are not "
        "in the answer's text without `include_stop_str_in_output`.",
    ),
    "header": About(
        "a part of the first messages that changes",
        "Something in front changes from call to call, such as a time or a counter: switch it off in the agent, move "
        "it behind the history, or remove it in the template.",
    ),
    "tools": About(
        "other tools than before",
        "The agent offers other tools in the middle of a conversation: offer all of them from the start, in one order.",
    ),
    "foreign": About(
        "an answer that this model never gave",
        "The history has an edited answer, or one of another model: keep the agent from editing, and do not train what "
        "follows as if the model had said it.",
    ),
    "other": About(
        "not known",
        "Compare both sides on the page of the rollout, which marks what differs.",
    ),
    "compaction": About(
        "a shorter history",
        "The agent sums up or cuts its history: meant, and a row of its own; a larger context makes it rarer.",
    ),
    "sub_agent": About(
        "another conversation of the same attempt",
        "Another system prompt: a sub-agent, or a call beside the conversation, such as one for a title. It is a "
        "row of its own; name it with `x-agl-agent-id` where the agent does not.",
    ),
    "retry": About(
        "the same prompt again",
        "A client asked again after an error or a time-out: raise its time-out, or look why the first answer was not "
        "used. Rows keep one of them.",
    ),
}
