"""What a token id stands for, as text: a vocabulary has it in the writing of its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from agentlightning.sender import Vocabulary

__all__ = ["Pieces"]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2 and most since) writes bytes as: itself where a byte can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
# SentencePiece's, for what it has no piece for.
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class Pieces:
    """The texts of ids. An id that stands for none, or that the vocabulary does not have, is written as itself.

    What is no whole character, since one may be cut over several ids, is shown as its bytes: `\\xe2\\x82`.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._tokens: Sequence[str | None] = () if vocabulary is None else vocabulary.tokens
        self._special = frozenset[int]() if vocabulary is None else vocabulary.special
        self._read = self._reader()

    @property
    def are_known(self) -> bool:
        """Whether there is a vocabulary."""
        return bool(self._tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether it is none of the text: a template puts it in, or it ends the answer."""
        return token_id in self._special

    def text(self, token_id: int) -> str:
        """The text of an id."""
        token = self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None
        if token is None:
            return f"[{token_id}]"
        return token if token_id in self._special else self._read(token).decode("utf-8", "backslashreplace")

    def _reader(self) -> Callable[[str], bytes]:
        """How the bytes of a token are read."""
        tokens = {token for token in self._tokens if token is not None}
        # Some vocabularies have no token for bytes that UTF-8 never has.
        if len(_BYTES.keys() & tokens) > 200:
            return _byte_level
        if any(_ONE_BYTE.fullmatch(token) or token.startswith(_SPACE) for token in tokens):
            return _sentence_piece
        return _as_it_is


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        # Added later, and written as it is.
        return _as_it_is(token)


def _sentence_piece(token: str) -> bytes:
    byte = _ONE_BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else _as_it_is(token.replace(_SPACE, " "))


def _as_it_is(token: str) -> bytes:
    return token.encode("utf-8", "replace")
