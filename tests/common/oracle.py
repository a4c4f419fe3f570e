"""The logprobs that trained ids must have: those of transformers' model over the row that they are in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import xgrammar

from agentlightning.generation import Generation
from agentlightning.trajectory import Trajectory
from tests.common.reference import logits, tokenizer

__all__ = ["check_logprobs"]

TOLERANCE = 1e-3


def check_logprobs(rows: Sequence[Trajectory], calls: Iterable[Generation]) -> None:
    """Check that the model itself gives the recorded logprobs to trained ids, and that no other id has one.

    vLLM's logprobs of an answer that a grammar leads are those among the ids that the grammar lets through.

    Args:
        calls: those of the rows.
    """
    leads = {each.id: json.loads(each.sampling_params or "{}").get("structured_outputs") for each in calls}
    assert rows
    for row in rows:
        assert row.logprobs_mode == "raw_logprobs"
        assert row.logprobs is not None
        of_model = logits(row.token_ids)
        expected = [0.0] * len(row.token_ids)
        for answer in row.spans:
            if answer.is_trained:
                ids = row.token_ids[answer.start : answer.end]
                before = of_model[answer.start - 1 : answer.end - 1].clone()
                expected[answer.start : answer.end] = _logprobs(before, ids, leads[answer.generation_id])
        assert row.logprobs.tolist() == pytest.approx(expected, abs=TOLERANCE)
        assert not any(each for each, is_trained in zip(row.logprobs, row.response_mask, strict=True) if not is_trained)


def _logprobs(logits: Any, token_ids: Sequence[int], structured_outputs: dict[str, Any] | None) -> list[float]:
    """Return the logprob of each id, from the logits of its place."""
    given = {name: value for name, value in (structured_outputs or {}).items() if value and not name.startswith("_")}
    if given:
        matcher = xgrammar.GrammarMatcher(_grammar(logits.shape[-1], **given))
        bitmask = xgrammar.allocate_token_bitmask(*logits.shape)
        for place, each in enumerate(token_ids):
            matcher.fill_next_token_bitmask(bitmask, place)
            assert matcher.accept_token(each)
        xgrammar.apply_token_bitmask_inplace(logits, bitmask)
    found = torch.log_softmax(logits.double(), -1)
    return found.gather(1, torch.tensor([*token_ids])[:, None])[:, 0].tolist()


@cache
def _grammar(vocabulary: int, regex: str = "", structural_tag: str = "") -> Any:
    """Compile what vLLM gives to xgrammar; any other kind of structured outputs is a TypeError."""
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=vocabulary))
    return compiler.compile_regex(regex) if regex else compiler.compile_structural_tag(structural_tag)
