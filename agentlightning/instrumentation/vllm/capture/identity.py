"""The identity of this process for its stores: host, process, model, and that model's vocabulary."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import agentlightning
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.sender import ID_LIMIT, Sender, Vocabulary

__all__ = ["Identity", "served_name"]

logger = logging.getLogger("agentlightning")


def served_name(model_config: Any) -> str | None:
    """Return the name that a frontend answers with: the first that the model is served under."""
    names = getattr(model_config, "served_model_name", None)
    return names[0] if isinstance(names, list) else names


class _Model(NamedTuple):
    """The model as far as it is known: its name, and each token's id, from the tokenizer; none where engines differ."""

    name: str | None = None
    ids: Mapping[Any, int] | None = None
    special: Collection[int] = ()


class Identity:
    """The `Sender` that this process is, as far as it is known; a forked child is another sender."""

    def __init__(self) -> None:
        self._model = _Model()
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        # Not when it is first asked for: generations may have been lost before that.
        self._started_at = time.time_ns()
        self._last: tuple[_Model, Sender] | None = None

    def note_model(self, model_config: Any) -> None:
        """Note which model is served."""
        self._model = self._model._replace(name=served_name(model_config))

    def note_engine(self, processor: Any, model_config: Any) -> None:
        """Note which model is served, and its vocabulary.

        Call this in the thread that makes the engine, before the engine serves: if two threads use a tokenizer at once,
        either may get "Already borrowed", vLLM's thread too.

        Args:
            processor: vLLM's `OutputProcessor`, which has the tokenizer.
        """
        self.note_model(model_config)
        contained("reading the vocabulary", self._note_vocabulary, getattr(processor, "tokenizer", None))

    def _note_vocabulary(self, tokenizer: Any) -> None:
        # 0.8.5 has it inside a TokenizerGroup, which has no vocabulary itself.
        if not hasattr(tokenizer, "get_vocab"):
            tokenizer = getattr(tokenizer, "tokenizer", None)
        # None with --skip-tokenizer-init.
        if tokenizer is None:
            return
        known, ids = self._model.ids, tokenizer.get_vocab()
        # A store takes a sender's vocabulary for that of all its generations.
        if known is not None and known != ids:
            if known:
                logger.warning(
                    "agentlightning: the engines of this process have different vocabularies, so the store is told "
                    "none of them; run each in a process of its own to have both"
                )
            ids = {}
        self._model = self._model._replace(ids=ids, special=_special_ids(tokenizer))

    def sender(self) -> Sender:
        """Return this process's `Sender`: an equal one until more is known. Only for the recorder's thread."""
        model = self._model
        if self._last is None:
            self._last = _Model(), self._describe_process()
        if self._last[0] is not model:
            vocabulary = contained("putting the vocabulary together", _vocabulary, model)
            self._last = model, replace(self._last[1], model=model.name, vocabulary=vocabulary)
        return self._last[1]

    def _describe_process(self) -> Sender:
        return Sender(
            host=os.uname().nodename,
            pid=os.getpid(),
            started_at=self._started_at,
            version=agentlightning.__version__,
            vllm=getattr(sys.modules.get("vllm"), "__version__", None),
        )


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all tokens that a tokenizer marks as special.

    `all_special_ids` of transformers has only those with a role, such as `eos_token`: `<|im_start|>` often has none.
    Tokenizers of other packages, such as mistral_common, have no `added_tokens_decoder`.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = (number for number, token in added.items() if getattr(token, "special", False))
    return {*tokenizer.all_special_ids, *marked}


def _vocabulary(model: _Model) -> Vocabulary | None:
    # A model's own tokenizer may have bytes for tokens.
    ids = {number: token for token, number in (model.ids or {}).items() if isinstance(token, str)}
    highest = max(ids, default=-1)
    if not 0 <= highest < ID_LIMIT:
        return None
    tokens = [ids.get(number) for number in range(highest + 1)]
    return Vocabulary(tokens, frozenset(number for number in model.special if 0 <= number <= highest))
