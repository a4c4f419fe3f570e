"""An agent whose answers are led to a text, since random weights say nothing of use; the ids that they choose for it
are their own."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import openai

from agentlightning.drift import Break
from agentlightning.store import open_store
from tests.drift.templates import CHATML, Message
from tests.recording.server import RecordingServer, until

__all__ = ["NEXT", "QUESTION", "SYSTEM", "Agent", "look", "said"]

SYSTEM = {"role": "system", "content": "You are a careful assistant."}
QUESTION = {"role": "user", "content": "Is it cold in Paris today, or not?"}
NEXT = {"role": "user", "content": "And tomorrow, what do you think?"}


class Agent:
    """An agent of a rollout, which asks with a template of its own, or else with the server's."""

    def __init__(self, server: RecordingServer, rollout: str, template: str | None = CHATML) -> None:
        url = f"{server.url}/rollout/{quote(rollout)}/attempt/a/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self.server, self.rollout = server, rollout
        self.template = {} if template is None else {"chat_template": template}
        self.calls = 0

    def ask(self, messages: list[Any], answer: str) -> None:
        """Ask, and lead the model to an answer."""
        led: Any = {"structured_outputs": {"choice": [answer]}, **self.template}
        self.client.chat.completions.create(
            model=self.server.model, messages=messages, max_tokens=200, temperature=0, extra_body=led
        )
        self.calls += 1

    def breaks(self) -> list[Break]:
        """Return the breaks of the rollout when all of its calls are recorded."""
        until(lambda: len(self.server.kept(rollout_id=self.rollout)) >= self.calls, f"{self.calls} calls")
        with open_store(self.server.store, read_only=True) as store:
            [attempt] = store.drift(self.rollout)
        return attempt.breaks


def said(text: str, **more: Any) -> Message:
    """Return an answer as a history has it."""
    return {"role": "assistant", "content": text, **more}


def look() -> Message:
    """Return an answer that calls a tool."""
    function = {"name": "look", "arguments": '{"city": "Paris"}'}
    # Mistral's ids have nine letters and digits.
    return said("", tool_calls=[{"id": "callnoone", "type": "function", "function": function}])
