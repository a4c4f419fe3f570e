"""String interning: each repeated text is stored once, and its key stands for it. The caller owns the transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from sqlalchemy import Connection, select

from agentlightning.store.database import found, in_parts, insert_rows, next_keys
from agentlightning.store.rows import storable, text_of
from agentlightning.store.tables import texts

__all__ = ["key_of", "keys_of", "known_keys", "texts_of"]


def keys_of(connection: Connection, wanted: Iterable[str | None]) -> dict[str | None, int | None]:
    """Map texts to their keys, storing those that are new; None is mapped to None."""
    of_texts = {text: _digest(text) for text in wanted if text is not None}
    # Texts that differ only in halves of surrogate pairs are the same to a database.
    digests = {digest: text for text, digest in of_texts.items()}
    known = _known(connection, digests)
    # Sorted, since two writers that insert the same texts in different orders would deadlock.
    fresh = sorted(digests.keys() - known.keys())
    if fresh:
        keys = next_keys(connection, texts, len(fresh))
        new = [(key, digest, storable(digests[digest])) for key, digest in zip(keys, fresh, strict=True)]
        if insert_rows(connection, texts, new, if_new=True) == len(new):
            known |= {digest: key for key, digest, _ in new}
        else:
            # Another writer has inserted some of them meanwhile.
            known |= _known(connection, fresh)
    return {None: None} | {text: known[digest] for text, digest in of_texts.items()}


def key_of(connection: Connection, text: str) -> int | None:
    """Return the key of a text; None for an unknown text."""
    return connection.execute(select(texts.c.key).where(texts.c.digest == _digest(text))).scalar()


def known_keys(connection: Connection, wanted: Iterable[str]) -> dict[str, int]:
    """Map texts to their keys; unknown texts are left out."""
    digests = {_digest(text): text for text in wanted}
    return {digests[digest]: key for digest, key in _known(connection, digests).items()}


def texts_of(connection: Connection, keys: Iterable[int | None]) -> Mapping[int | None, str | None]:
    """Map keys to their texts, and None to None."""
    wanted = [key for key in keys if key is not None]
    rows = (row for some in in_parts(wanted) for row in found(connection, texts, ("key", "text"), "key", some))
    return {None: None} | {key: text_of(text) for key, text in rows}


def _known(connection: Connection, digests: Iterable[bytes]) -> dict[bytes, int]:
    rows = (row for some in in_parts([*digests]) for row in found(connection, texts, ("digest", "key"), "digest", some))
    return {bytes(digest): key for digest, key in rows}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
