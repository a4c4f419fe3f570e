"""Texts that repeat: kept once, and stood for by a number. Everything here works inside a transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from sqlalchemy import Connection, select

from agentlightning.store.database import found, in_parts, insert_rows, next_keys
from agentlightning.store.rows import storable, text_of
from agentlightning.store.tables import texts

__all__ = ["key_of", "keys_of", "texts_of"]


def keys_of(connection: Connection, wanted: Iterable[str | None]) -> dict[str | None, int | None]:
    """Each text's key, and None for None; texts that have none get one."""
    of_texts = {text: _digest(text) for text in wanted if text is not None}
    # Two that differ in halves of surrogate pairs alone are the same to a database.
    digests = {digest: text for text, digest in of_texts.items()}
    known = _known(connection, digests)
    # In one order for everybody: of two that put in the same texts, each would wait for the other.
    fresh = sorted(digests.keys() - known.keys())
    if fresh:
        keys = next_keys(connection, texts, len(fresh))
        new = [(key, digest, storable(digests[digest])) for key, digest in zip(keys, fresh, strict=True)]
        if insert_rows(connection, texts, new, if_new=True) == len(new):
            known |= {digest: key for key, digest, _ in new}
        else:
            # Somebody else has put some of them in since.
            known |= _known(connection, fresh)
    return {None: None} | {text: known[digest] for text, digest in of_texts.items()}


def key_of(connection: Connection, text: str) -> int | None:
    """The key of a text; None where it has none."""
    return connection.execute(select(texts.c.key).where(texts.c.digest == _digest(text))).scalar()


def texts_of(connection: Connection, keys: Iterable[int | None]) -> Mapping[int | None, str | None]:
    """Each key's text, and None for None."""
    wanted = [key for key in keys if key is not None]
    rows = (row for some in in_parts(wanted) for row in found(connection, texts, ("key", "text"), "key", some))
    return {None: None} | {key: text_of(text) for key, text in rows}


def _known(connection: Connection, digests: Iterable[bytes]) -> dict[bytes, int]:
    rows = (row for some in in_parts([*digests]) for row in found(connection, texts, ("digest", "key"), "digest", some))
    return {bytes(digest): key for digest, key in rows}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
