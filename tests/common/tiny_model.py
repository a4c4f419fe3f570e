"""Chat models that need no download: Qwen2s of random weights, each with a byte-level BPE tokenizer of its own.

Random weights emit invalid UTF-8, special tokens and merges that tokenise differently the second time: what breaks
whoever sends text through a tokenizer again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_MESSAGES = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
_TOOLS = "{% if tools %}{% for tool in tools %}<|im_start|>tool\n{{ tool | tojson }}<|im_end|>\n{% endfor %}{% endif %}"
_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT_TEMPLATE = _MESSAGES + _TOOLS + _ANSWER
TOOLS_FIRST = _TOOLS + _MESSAGES + _ANSWER
"""A template as most models have it: where tools come last, each call of an agent breaks the one before it."""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "Exact token ids are what went into the model and came out of it; text is what a reader sees.",
    'Call a tool: {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}} and read its answer.',
    "Größe, naïve, 北京, 東京, 😀 — one two three four five six seven eight nine ten.",
]


@dataclass(frozen=True)
class Size:
    """Dimensions of a model.

    Attributes:
        tokens: in its vocabulary, at the least: those that are missing are made up, and no text has them.
        spread: standard deviation of its weights.
        special: special tokens besides the usual ones.
        stop: the token that ends its answers.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    positions: int
    spread: float
    dtype: str
    tokens: int = 0
    special: tuple[str, ...] = ()
    stop: str = "<|im_end|>"


TINY = Size(64, 128, 2, 2, 2, 2048, 0.5, "float32")
"""100k weights."""
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
LLAMA = replace(TINY, special=LLAMA_TOKENS, stop="<|eot_id|>")
"""The same with the special tokens of Llama 3."""
SMALL = Size(896, 4864, 24, 14, 2, 4096, 0.02, "bfloat16", 151_936)
"""494 million, in the shape of Qwen2.5-0.5B."""


def tiny_model() -> Path:
    """The folder of the tiny model, made on the first call (some ten seconds) and kept in `.cache/`."""
    return _kept("tiny-model", TINY)


def llama_model() -> Path:
    """The folder of a tiny model that has the special tokens of Llama 3, likewise."""
    return _kept("tiny-llama", LLAMA)


def mistral_model() -> Path:
    """The folder of a tiny model with a tokenizer of Mistral's, of `mistral-common`, likewise."""
    return _kept("tiny-mistral", TINY, _make_mistral)


def small_model() -> Path:
    """The folder of the small one, likewise: a minute, and 1 GB."""
    return _kept("small-model", SMALL)


def _kept(name: str, size: Size, make: Callable[[Path, Size], None] | None = None) -> Path:
    folder = Path(__file__).parents[2] / ".cache" / name
    if not (folder / "config.json").exists():
        folder.parent.mkdir(exist_ok=True)
        # Made beside it and renamed: whoever is interrupted leaves no half a model behind.
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            (make or _make)(Path(unfinished) / "model", size)
            os.replace(Path(unfinished) / "model", folder)
    return folder


def _make(folder: Path, size: Size) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[*SPECIAL_TOKENS, *size.special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() + len(MARKUP_TOKENS) < size.tokens:
        tokenizer = Tokenizer.from_str(_filled_up(tokenizer.to_str(), size.tokens - len(MARKUP_TOKENS)))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=size.stop, pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = size.positions

    _make_weights(folder, size, len(fast), fast.eos_token_id, fast.pad_token_id)
    fast.save_pretrained(folder)


def _make_mistral(folder: Path, size: Size) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer: Any = MistralTokenizer.v7().instruct_tokenizer.tokenizer
    _make_weights(folder, size, tokenizer.n_words, tokenizer.eos_id, tokenizer.eos_id)
    shutil.copyfile(tokenizer.file_path, folder / "tokenizer.model.v7")


def _make_weights(folder: Path, size: Size, tokens: int, stop: int, padding: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tokens,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        eos_token_id=stop,
        pad_token_id=padding,
        initializer_range=size.spread,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
    model.save_pretrained(folder)


def _filled_up(tokenizer: str, tokens: int) -> str:
    """The tokenizer, as JSON, with so many tokens: those that are made up are words that no merge leads to."""
    state = json.loads(tokenizer)
    vocabulary = state["model"]["vocab"]
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    made_up = (word for word in words if word not in vocabulary)
    vocabulary.update(zip(made_up, range(len(vocabulary), tokens), strict=False))
    return json.dumps(state)


if __name__ == "__main__":
    sys.stdout.write(f"{tiny_model()}\n")
