"""Which text a token id stands for, in the writing of each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from agentlightning.sender import Vocabulary
from agentlightning.server.page.token_text import TokenTexts

pytestmark = pytest.mark.tier("check")

TEXT = "Where is the largest größe?\n\n\tIn 北京, 1 + 1 = 2. <b>é\N{GRINNING FACE}"
END = "<|im_end|>"


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(["where is the largest in the largest"], trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Mistral have it."""
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
    """What was one character over several ids is one again: only there is `\\x..` written."""
    return "".join(texts).encode().decode("unicode_escape").encode("latin-1")


@pytest.mark.parametrize("made", [byte_level, sentence_piece])
def test_the_pieces_of_a_text_are_the_text(made: Callable[[], Tokenizer]) -> None:
    tokenizer = made()
    pieces = TokenTexts(vocabulary(tokenizer))
    token_ids = tokenizer.encode(TEXT + END).ids

    assert bytes_of([pieces.text(each) for each in token_ids]) == (TEXT + END).encode()
    assert [each for each in token_ids if pieces.is_special(each)] == [tokenizer.token_to_id(END)]


def test_a_whole_character_is_shown_and_a_part_of_one_is_its_bytes() -> None:
    pieces = TokenTexts(Vocabulary([*pre_tokenizers.ByteLevel.alphabet(), "Ã¶", "Ġthe"]))
    there = [pieces.text(each) for each in range(258)]

    assert there[256:] == ["ö", " the"]
    assert "\\xc3" in there
    assert " " in there
    assert "\n" in there


def test_an_id_that_stands_for_nothing_is_shown_as_itself() -> None:
    assert [TokenTexts(Vocabulary(["a", None])).text(each) for each in (0, 1, 2, -1)] == ["a", "[1]", "[2]", "[-1]"]
    assert TokenTexts(None).text(7) == "[7]"
    assert not TokenTexts(None).are_known
