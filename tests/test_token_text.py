"""Texts of token ids, for each notation of vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from agentlightning.sender import Vocabulary
from agentlightning.token_text import TokenTexts

pytestmark = pytest.mark.tier("check")

TEXT = "Where is the largest größe?\n\n\tIn 北京, 1 + 1 = 2. <b>é\N{GRINNING FACE}"
END = "<|im_end|>"


def byte_level() -> Tokenizer:
    """Train a tokenizer like those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(["where is the largest in the largest"], trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Make a tokenizer like those of Llama 2 and Mistral."""
    known = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Wherislagt?In.12=+,"]
    vocabulary = {token: token_id for token_id, token in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.add_special_tokens([END])
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    found: list[str | None] = [None] * tokenizer.get_vocab_size()
    for token, token_id in tokenizer.get_vocab().items():
        found[token_id] = token
    return Vocabulary(found, frozenset({tokenizer.get_vocab()[END]}))


def bytes_of(texts: Sequence[str]) -> bytes:
    """Join texts, and turn `\\x..`, the parts of characters, back into bytes."""
    return "".join(texts).encode().decode("unicode_escape").encode("latin-1")


@pytest.mark.parametrize("made", [byte_level, sentence_piece])
def test_texts_of_tokens_joined_are_the_text(made: Callable[[], Tokenizer]) -> None:
    tokenizer = made()
    texts = TokenTexts(vocabulary(tokenizer))
    token_ids = tokenizer.encode(TEXT + END).ids

    assert bytes_of([texts.text(each) for each in token_ids]) == (TEXT + END).encode()
    assert [each for each in token_ids if texts.is_special(each)] == [tokenizer.token_to_id(END)]


def test_part_of_a_character_becomes_its_bytes() -> None:
    texts = TokenTexts(Vocabulary([*pre_tokenizers.ByteLevel.alphabet(), "Ã¶", "Ġthe"]))
    found = [texts.text(each) for each in range(258)]

    assert found[256:] == ["ö", " the"]
    assert "\\xc3" in found
    assert " " in found
    assert "\n" in found


def test_id_without_a_text_becomes_its_number() -> None:
    assert [TokenTexts(Vocabulary(["a", None])).text(each) for each in (0, 1, 2, -1)] == ["a", "[1]", "[2]", "[-1]"]
    assert TokenTexts(None).text(7) == "[7]"
    assert not TokenTexts(None).are_known
