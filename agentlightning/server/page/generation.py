"""The page of one generation: its token ids, each shown as its text."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from sqlalchemy import Connection

from agentlightning.generation import Choice, Generation, SamplingMask, TopLogprobs
from agentlightning.store import generations, senders
from agentlightning.token_text import TokenTexts

__all__ = ["TokenHtml", "choice_values", "prompt_tokens"]

# A browser lays out and paints only the blocks in view. A block ends at the end of a line, if there is one in time.
MIN_BLOCK, MAX_BLOCK = 256, 768
NANOSECONDS = 1e9

PROBABILITIES = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Lower bounds of the first five of the six colours, by a token's probability."""
_BOUNDS = [math.log(each) for each in PROBABILITIES]

_LINE_BREAK = Markup("<i></i>\n")


@dataclass(frozen=True, slots=True)
class TokenHtml:
    """Token ids as HTML.

    Attributes:
        blocks: blocks of some hundred ids, each an element with `data-t="ID LOGPROB"`; with `data-a`, the alternatives
            to it as JSON, `[[id, text, logprob], ...]`; and with `data-m`, from how many ids it was chosen.
        length: the number of ids.
        has_texts: whether their texts are known.
    """

    blocks: Sequence[Markup]
    length: int
    has_texts: bool


@dataclass(frozen=True, slots=True)
class LogprobSummary:
    """The plot of logprobs, in words."""

    mean: float
    lowest: float
    lowest_at: int


def choice_values(connection: Connection, generation_id: str, index: int) -> dict[str, Any] | None:
    """Return the values for the template of a generation and one of its choices; None if it does not exist."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    choices = generation.choices
    # A link to a choice that does not exist shows the first.
    choice = next((each for each in choices if each.index == index), choices[0] if choices else None)
    texts = TokenTexts(senders.vocabulary_of(connection, generation_id))
    token_ids, logprobs = (None, None) if choice is None else (choice.token_ids, choice.logprobs)
    top, mask = (None, None) if choice is None else (choice.top_logprobs, choice.sampling_mask)
    return {
        "generation": generation,
        "choice": choice,
        "tokens": None if token_ids is None else _token_html(token_ids, logprobs, texts, top, mask),
        "summary": None if not logprobs else _summary(logprobs),
        "fields": list(_fields(generation, choice)),
        "parameters": _indented(generation.sampling_params),
        "requested": _indented(generation.requested_params),
        "prompt_length": None if generation.prompt_token_ids is None else len(generation.prompt_token_ids),
        "probabilities": PROBABILITIES,
    }


def prompt_tokens(connection: Connection, generation_id: str) -> TokenHtml | None:
    """Return the tokens of a generation's prompt; None if the generation does not exist."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    texts = TokenTexts(senders.vocabulary_of(connection, generation_id))
    top, ids = generation.prompt_logprobs, generation.prompt_token_ids or array("i")
    return _token_html(ids, None if top is None else _own_logprobs(ids, top), texts, top)


def _own_logprobs(token_ids: array[int], top: TopLogprobs) -> array[float]:
    """Return the logprob of each id itself; NaN where it has none, as the first of a prompt."""
    found = array("f")
    for token_id, start, end in zip(token_ids, top.offsets, top.offsets[1:], strict=False):
        pairs = zip(top.ids[start:end], top.logprobs[start:end], strict=True)
        found.append(next((logprob for each, logprob in pairs if each == token_id), math.nan))
    return found


def _token_html(
    token_ids: array[int],
    logprobs: array[float] | None,
    texts: TokenTexts,
    top: TopLogprobs | None = None,
    mask: SamplingMask | None = None,
) -> TokenHtml:
    more = (
        [_more(place, token_id, texts, top, mask) for place, token_id in enumerate(token_ids)] if top or mask else None
    )
    return TokenHtml(list(_blocks(token_ids, logprobs, texts, more)), len(token_ids), texts.are_known)


def _more(place: int, token_id: int, texts: TokenTexts, top: TopLogprobs | None, mask: SamplingMask | None) -> str:
    """Return the attributes of a token that say what else could have been there."""
    found = ""
    if top is not None and place < len(top):
        start, end = top.offsets[place], top.offsets[place + 1]
        pairs = zip(top.ids[start:end], top.logprobs[start:end], strict=True)
        others = [[each, texts.text(each), f"{logprob:.5g}"] for each, logprob in pairs if each != token_id]
        if others:
            found += f' data-a="{escape(json.dumps(others, ensure_ascii=False))}"'
    if mask is not None and place < len(mask):
        found += f' data-m="{mask.offsets[place + 1] - mask.offsets[place]}"'
    return found


def _blocks(
    token_ids: array[int], logprobs: array[float] | None, texts: TokenTexts, more: Sequence[str] | None
) -> Iterator[Markup]:
    block: list[str] = []
    # A long answer repeats the same ids.
    written: dict[int, tuple[Markup, bool]] = {}
    for place, token_id in enumerate(token_ids):
        if token_id not in written:
            text = texts.text(token_id)
            written[token_id] = _with_breaks(text), text.endswith("\n")
        text, ends_line = written[token_id]
        # By hand: for a long answer a template would take as long as everything else.
        special = " s" if texts.is_special(token_id) else ""
        also = "" if more is None else more[place]
        if logprobs is None or place >= len(logprobs) or math.isnan(logprobs[place]):
            block.append(f'<b class="t{special}" data-t="{token_id}"{also}>{text}</b>')
        else:
            logprob = logprobs[place]
            values = f'data-t="{token_id} {logprob:.5g}"{also}'
            block.append(f'<b class="t l{_colour(logprob)}{special}" {values}>{text}</b>')
        if len(block) >= MAX_BLOCK or (ends_line and len(block) >= MIN_BLOCK):
            yield Markup("".join(block))
            block = []
    if block:
        yield Markup("".join(block))


def _with_breaks(text: str) -> Markup:
    """Escape a text, and mark each line break visibly, in a way that is not copied."""
    return escape(text).replace("\n", _LINE_BREAK)


def _colour(logprob: float) -> int:
    return next((place for place, bound in enumerate(_BOUNDS) if logprob >= bound), len(_BOUNDS))


def _summary(logprobs: array[float]) -> LogprobSummary | None:
    # A faulty engine may return NaN.
    known = [place for place, each in enumerate(logprobs) if not math.isnan(each)]
    if not known:
        return None
    lowest = min(known, key=logprobs.__getitem__)
    return LogprobSummary(sum(logprobs[place] for place in known) / len(known), logprobs[lowest], lowest)


def _fields(generation: Generation, choice: Choice | None) -> Iterator[tuple[str, object]]:
    """Yield the names and values of all other known facts."""
    started, first, finished = generation.started_at, generation.first_token_at, generation.finished_at
    found: dict[str, object] = {
        "Status": generation.status,
        "Model": generation.model,
        "Answered by": generation.served_model,
        "Endpoint": generation.endpoint,
        "Finish reason": choice and choice.finish_reason,
        "Stop reason": choice and choice.stop_reason,
        "Prompt tokens": None if generation.prompt_token_ids is None else len(generation.prompt_token_ids),
        "Cached prompt tokens": generation.cached_tokens,
        "Output tokens": None if choice is None or choice.token_ids is None else len(choice.token_ids),
        "Time to first token": first and started and f"{(first - started) / NANOSECONDS:.3f} s",
        "Time to last token": started and f"{(finished - started) / NANOSECONDS:.3f} s",
        "Logprobs": generation.logprobs_mode,
        "Weights": choice and ", ".join(map(_version, choice.weight_versions or ())),
        "Attempt": generation.attempt_id,
        "Session": generation.session_id,
        "Agent": generation.agent_id,
        "Parent agent": generation.parent_agent_id,
        "Purpose": generation.purpose,
        "Retries before": generation.retry or None,
        "Came by": generation.via,
        "Trace": generation.trace_id,
        "Response id": generation.response_id,
        "Call": generation.call_id,
        "Generation": generation.id,
    }
    return ((name, value) for name, value in found.items() if value is not None and value != "")


def _version(found: tuple[str, int, int]) -> str:
    version, start, end = found
    return f"{version} ({start} to {end})"


def _indented(sampling_params: str | None) -> str | None:
    if sampling_params is None:
        return None
    try:
        return json.dumps(json.loads(sampling_params), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        # A program that writes generations itself may use another format.
        return sampling_params
