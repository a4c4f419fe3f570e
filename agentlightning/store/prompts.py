"""The prompts of generations in a database: their beginnings in shared blocks. The caller owns the transaction."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from agentlightning.store import blocks
from agentlightning.store.chains import FIRST, IDS, NEXT, TEXTS, Chain, Prompt
from agentlightning.store.rows import array_of, storable, text_of

__all__ = ["StoredPrompt", "add", "ids_of", "texts_of"]

BYTES_OF_AN_ID = 4
NOTHING: Chain[Any] = Chain(b"")


class StoredPrompt(NamedTuple):
    """A prompt as the row of its generation has it.

    Attributes:
        tokens: the number of its ids.
        ids, text: what follows the blocks.
        ids_block, text_block: keys of the last blocks; None without blocks.
    """

    tokens: int
    ids: bytes | None
    text: str | None
    ids_block: int | None
    text_block: int | None


def add(connection: Connection, prompts: Sequence[Prompt]) -> list[StoredPrompt]:
    """Store the blocks of prompts.

    Raises:
        Lacking: blocks that prompts continue are not there.
    """
    ids = blocks.add(connection, IDS, [prompt.ids or NOTHING for prompt in prompts])
    texts = blocks.add(connection, TEXTS, [prompt.text or NOTHING for prompt in prompts])
    return [_stored(*each) for each in zip(prompts, ids, texts, strict=True)]


def _stored(prompt: Prompt, ids: blocks.Stored, text: blocks.Stored) -> StoredPrompt:
    rest = None if prompt.ids is None else prompt.ids.rest
    in_blocks = FIRST + (ids.depth - 1) * NEXT if ids.depth else 0
    tokens = (in_blocks + len(rest or b"")) // BYTES_OF_AN_ID
    return StoredPrompt(
        tokens, rest, None if prompt.text is None else storable(prompt.text.rest), ids.key or None, text.key or None
    )


def ids_of(connection: Connection, rows: Sequence[Any]) -> list[array[int] | None]:
    """Read the ids of prompts; None where they are unknown, or where a block of theirs is missing.

    Args:
        rows: each has `prompt_token_ids` and `ids_block`.
    """
    known = blocks.contents(connection, IDS, [row.ids_block for row in rows])
    return [array_of("i", _whole(known, row.ids_block, row.prompt_token_ids)) for row in rows]


def texts_of(connection: Connection, rows: Sequence[Any]) -> list[str | None]:
    """Read the texts of prompts; None where they are unknown, or where a block of theirs is missing.

    Args:
        rows: each has `prompt_text` and `text_block`.
    """
    known = blocks.contents(connection, TEXTS, [row.text_block for row in rows])
    found: list[str | None] = []
    for row in rows:
        rest = text_of(row.prompt_text)
        whole = _whole(known, row.text_block, None if rest is None else rest.encode())
        found.append(None if whole is None else whole.decode())
    return found


def _whole(known: Mapping[int | None, bytes], key: int | None, rest: bytes | None) -> bytes | None:
    """Put the rest of a content after its blocks."""
    if key is None or rest is None:
        return rest
    beginning = known.get(key)
    return None if beginning is None else beginning + rest
