"""Answers of the tests' own worker: it has no model, and a request's `seed` chooses its tokens.

The tests know them as well, so that ids in answers are compared with the very ones that the engine was given.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

TOOL_CALL, ARGUMENTS, CALLS, SENTENCE, ANYTHING = 1, 2, 3, 4, 100
"""Seeds. `n` counts on from there: the choices of a request with `ANYTHING` have 100, 101, ..."""

TEXTS = {
    TOOL_CALL: 'So:<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    ARGUMENTS: '{"city": "Paris"}',
    CALLS: '[{"name": "get_weather", "parameters": {"city": "Paris"}}]',
    SENTENCE: "One two three four five six.",
}

PACE = 0.003
"""Seconds for a token, so that a client can hang up before the end of a long answer."""


@cache
def chosen_token_ids(model: Path, seed: int) -> list[int]:
    """Return what is said for `seed`, until its end of sequence; without text, more than any request can take."""
    # Not transformers, which the worker of every release would have to import.
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    if seed in TEXTS:
        # Letter by letter: who tokenises the text a second time gets other ids.
        pieces = re.findall(r"</?tool_call>|.", TEXTS[seed], re.DOTALL)
        spelt = [token for piece in pieces for token in tokenizer.encode(piece).ids]
        return [*spelt, tokenizer.token_to_id("<|im_end|>")]
    # As random weights do: invalid UTF-8, halves of characters. No special tokens, and no markup for a parser.
    ordinary = sorted(token_id for token, token_id in tokenizer.get_vocab().items() if not token.startswith("<"))
    return random.Random(seed).choices(ordinary, k=2048)
