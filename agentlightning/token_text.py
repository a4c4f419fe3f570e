"""The text of token ids, decoded from the notation that a tokenizer's vocabulary uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from agentlightning.sender import Vocabulary

__all__ = ["TokenTexts"]


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level BPE (GPT-2 and most since) to bytes; a printable byte is its own character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
# SentencePiece writes bytes that no piece covers so.
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenTexts:
    """The texts of ids; an id without a text is shown as its number, `[7]`.

    A part of a character, which may be split over several ids, is shown as its bytes: `\\xe2\\x82`.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._tokens: Sequence[str | None] = () if vocabulary is None else vocabulary.tokens
        self._special = frozenset[int]() if vocabulary is None else vocabulary.special
        self._decode = self._decoder()
        self._known: dict[int, bytes] = {}

    @property
    def special(self) -> frozenset[int]:
        """The ids of special tokens."""
        return self._special

    @property
    def are_known(self) -> bool:
        """True if there is a vocabulary."""
        return bool(self._tokens)

    def is_special(self, token_id: int) -> bool:
        """True if the token is not part of the text: a template inserts it, or it ends the answer."""
        return token_id in self._special

    def text(self, token_id: int) -> str:
        """Return the text of an id."""
        return self._bytes(token_id).decode("utf-8", "backslashreplace")

    def join(self, token_ids: Iterable[int]) -> str:
        """Return the text of ids that follow each other, special tokens included, as a client sees it.

        Bytes that make no character are U+FFFD, as in an answer.
        """
        known, one = self._known, self._bytes
        # A long prompt repeats the same ids.
        return b"".join([known.get(each) or one(each) for each in token_ids]).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            token = self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None
            if token is None:
                found = f"[{token_id}]".encode()
            else:
                found = _verbatim(token) if token_id in self._special else self._decode(token)
            self._known[token_id] = found
        return found

    def _decoder(self) -> Callable[[str], bytes]:
        """Choose how to turn a token into bytes, by the notation that the vocabulary uses."""
        tokens = {token for token in self._tokens if token is not None}
        # Some vocabularies have no token for bytes that never occur in UTF-8; others have a token for each of these
        # characters themselves, and more words with a blank of another notation.
        blanks = Counter(token[:1] for token in tokens)
        if len(_BYTES.keys() & tokens) > 200 and blanks[_BYTE_SPACE] >= max(blanks[_SPACE], blanks[" "]):
            return _byte_level
        if any(_ONE_BYTE.fullmatch(token) or token.startswith(_SPACE) for token in tokens):
            return _sentence_piece
        return _verbatim


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        # A token that was added to the vocabulary later is plain text.
        return _verbatim(token)


def _sentence_piece(token: str) -> bytes:
    byte = _ONE_BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else _verbatim(token.replace(_SPACE, " "))


def _verbatim(token: str) -> bytes:
    return token.encode("utf-8", "replace")
