"""The tiny model in transformers, as a reference, and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from tests.common.tiny_model import tiny_model

KEPT_BACK = 4
"""The most tokens that a character of UTF-8 can be spread over."""


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model())


@cache
def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def shows(token_ids: Sequence[int], text: str) -> bool:
    """Tell whether `text` is the text of these ids.

    vLLM holds back text that ends in half a character. How many replacement characters stand for bytes that are not a
    character depends on where a stream cuts them.
    """
    ends = range(len(token_ids), max(len(token_ids) - KEPT_BACK, 0) - 1, -1)
    said = (tokenizer().decode(token_ids[:end], skip_special_tokens=True) for end in ends)
    return any(_replaced(each) == _replaced(text) for each in said)


def _replaced(text: str) -> str:
    return re.sub("\ufffd+", "\ufffd", text).rstrip("\ufffd")


def greedy(prompt_token_ids: Sequence[int], tokens: int) -> list[int]:
    """The most likely continuation, token by token, up to and with the end of sequence."""
    import torch

    token_ids = list(prompt_token_ids)
    with torch.inference_mode():
        for _ in range(tokens):
            token_ids.append(int(_model()(torch.tensor([token_ids])).logits[0, -1].argmax()))
            if token_ids[-1] == tokenizer().eos_token_id:
                break
    return token_ids[len(prompt_token_ids) :]


def logits(token_ids: Sequence[int]) -> Any:
    """The logits of the id after each."""
    import torch

    with torch.inference_mode():
        return _model()(torch.tensor([[*token_ids]])).logits[0]
