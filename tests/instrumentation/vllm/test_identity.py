"""The vocabulary that a process tells its stores, taken from the tokenizer that vLLM has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.instrumentation.vllm.capture.identity import Identity
from agentlightning.sender import Vocabulary
from tests.common.reference import tokenizer
from tests.common.tiny_model import SPECIAL_TOKENS


def special_of(found: Any) -> frozenset[int]:
    """Return the special ids that an engine with this tokenizer tells of."""
    identity = Identity()
    identity.note_engine(SimpleNamespace(tokenizer=found), SimpleNamespace(served_model_name="tiny-model"))
    vocabulary = identity.sender().vocabulary
    assert vocabulary is not None
    return vocabulary.special


def test_every_token_that_the_tokenizer_marks_is_special() -> None:
    # `<|im_start|>` has no role: it neither ends a text nor fills one up.
    assert "<|im_start|>" not in tokenizer().all_special_tokens

    assert special_of(tokenizer()) == {*tokenizer().convert_tokens_to_ids(SPECIAL_TOKENS)}


def test_tokenizer_of_another_package_tells_of_its_special_tokens() -> None:
    # As those of mistral_common, without tokens that were added.
    other = SimpleNamespace(get_vocab=lambda: {"<s>": 0, "a": 1, "</s>": 2}, all_special_ids=[0, 2])

    assert special_of(other) == {0, 2}


def test_engines_with_different_vocabularies_tell_none(caplog: pytest.LogCaptureFixture) -> None:
    identity = Identity()

    def vocabulary_with(token: str) -> Vocabulary | None:
        tokens = SimpleNamespace(get_vocab=lambda: {token: 0}, all_special_ids=[])
        identity.note_engine(SimpleNamespace(tokenizer=tokens), SimpleNamespace(served_model_name="tiny-model"))
        return identity.sender().vocabulary

    assert vocabulary_with("a") == vocabulary_with("a") == Vocabulary(["a"])
    assert caplog.text == ""
    assert [vocabulary_with("b"), vocabulary_with("b"), vocabulary_with("a")] == [None, None, None]
    assert caplog.text.count("have different vocabularies, so the store is told none of them") == 1
