"""What is told and asked about those that write generations. Moments are nanoseconds since the epoch, as theirs are."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, Field, StringConstraints

from agentlightning.server.models.common import Sent, Whole, example

__all__ = ["Digest", "Greeted", "Greeting", "SenderId", "Senders", "Vocabulary"]

_HEX = "[0-9a-f]"
_DIGEST = f"^{_HEX}{{64}}$"
_INTEGER_LIMIT = 2**63

SenderId = Annotated[
    str,
    Path(pattern=f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$", description="A UUID, its own."),
]
Digest = Annotated[str, Path(pattern=_DIGEST, description="The SHA-256 of the JSON of a vocabulary.")]
# A model may be served under the path of a folder.
Name = Annotated[str, StringConstraints(max_length=4096)]
Integer = Annotated[Whole, Field(ge=-_INTEGER_LIMIT, lt=_INTEGER_LIMIT)]


class Greeting(Sent):
    """A process that will write generations. What is unknown is null."""

    model_config = example(
        host="gpu-1",
        pid=4304,
        started_at=1795454234000000000,
        version="0.1.0",
        vllm="0.32.0",
        model="Qwen/Qwen3-0.6B",
        vocabulary=None,
    )

    host: Name
    pid: Integer
    started_at: Integer
    version: Name = Field(description="Of agentlightning.")
    vllm: Name | None = Field(None, description="The version of vLLM.")
    model: Name | None = Field(None, description="The name that its model is served under.")
    vocabulary: str | None = Field(None, pattern=_DIGEST, description="The digest of what its token ids stand for.")


class Greeted(BaseModel):
    """What is missing yet."""

    vocabulary: Literal["known", "wanted"] | None = Field(description="One that is wanted is to be put here, too.")


class Vocabulary(BaseModel):
    """A vocabulary that is kept."""

    tokens: int = Field(description="How many ids it has.")


class Minute(BaseModel):
    """What was written in a minute."""

    minute: int = Field(description="Since the epoch.")
    generations: int
    prompt_tokens: int
    output_tokens: int


class Sender(BaseModel):
    """A process that has written generations, and what it has written in the last hour."""

    id: str
    host: str
    pid: int
    started_at: int
    version: str
    vllm: str | None
    model: str | None
    vocabulary: str | None
    seen_at: int = Field(description="When something was heard of it last.")
    minutes: list[Minute] = Field(description="Those in which it has written something, in order.")
    lag_mean: float | None = Field(description="Seconds from when a generation had finished to when it was written.")
    lag_max: float | None
    lost: int = Field(description="Generations that it could not have kept, as it has told.")


class Senders(BaseModel):
    """Those of which something was heard in the last hour, at most a hundred, from the last one on."""

    items: list[Sender]
