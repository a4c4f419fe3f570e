"""The prompts of generations in a database: their beginnings in shared blocks. The caller owns the transaction."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from agentlightning.generation import Generation
from agentlightning.store import blocks
from agentlightning.store.chains import FIRST, IDS, NEXT, TEXTS, Chain, Prompt
from agentlightning.store.rows import array_of, bytes_of, storable, text_of

__all__ = ["StoredPrompt", "add", "add_cut", "ids_of", "texts_of"]

BYTES_OF_AN_ID = 4
NOTHING: Chain[Any] = Chain(b"")

StoredPrompt = tuple[int, "int | None", "int | None", "bytes | None", "str | None"]
"""A prompt as the row of its generation has it.

The number of its ids; the keys of the last blocks of the ids and of the text, None without any; and the ids and the
text that follow the blocks.
"""
UNKNOWN: StoredPrompt = (0, None, None, None, None)


def add(
    connection: Connection, generations: Sequence[Generation], cut: Mapping[str, Prompt] | None = None
) -> list[StoredPrompt]:
    """Store the blocks of the prompts of generations.

    Args:
        cut: the prompts that arrived in blocks, by the ids of their generations.

    Raises:
        Lacking: blocks that prompts continue are not there.
    """
    stored: list[StoredPrompt] = []
    long: list[tuple[int, Prompt]] = []
    for generation in generations:
        ids, text = generation.prompt_token_ids, generation.prompt_text
        prompt = cut.get(generation.id) if cut else None
        if prompt is None and (len(ids or ()) >= FIRST // BYTES_OF_AN_ID or len(text or "") >= FIRST):
            prompt = Prompt.of(generation, blocks.recent_of(connection))
        if prompt is not None:
            long.append((len(stored), prompt))
        stored.append((len(ids or ()), None, None, bytes_of(ids), storable(text)) if prompt is None else UNKNOWN)
    if long:
        for (position, _), found in zip(long, add_cut(connection, [prompt for _, prompt in long]), strict=True):
            stored[position] = found
    return stored


def add_cut(connection: Connection, prompts: Sequence[Prompt]) -> list[StoredPrompt]:
    """Store the blocks of prompts that are cut already.

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
    text_rest = None if prompt.text is None else storable(prompt.text.rest)
    packed = IDS.pack(rest) if rest and ids.key else rest
    return tokens, ids.key or None, text.key or None, packed, text_rest


def ids_of(connection: Connection, rows: Sequence[Any]) -> list[array[int] | None]:
    """Read the ids of prompts; None where they are unknown, or where a block of theirs is missing.

    Args:
        rows: each has `prompt_token_ids` and `ids_block`.
    """
    known = blocks.contents(connection, IDS, [row.ids_block for row in rows])
    found: list[array[int] | None] = []
    for row in rows:
        rest = row.prompt_token_ids
        whole = _whole(known, row.ids_block, IDS.unpack(rest) if rest and row.ids_block else rest)
        found.append(array_of("i", whole))
    return found


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
        # Never an error: it would keep all others of its page from being read.
        found.append(None if whole is None else whole.decode(errors="replace"))
    return found


def _whole(known: Mapping[int | None, bytes], key: int | None, rest: bytes | None) -> bytes | None:
    """Put the rest of a content after its blocks."""
    if key is None or rest is None:
        return rest
    beginning = known.get(key)
    return None if beginning is None else beginning + rest
