"""The page of one generation: its token ids, each shown as its text."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape
from sqlalchemy import Connection

from agentlightning.generation import Choice, Generation, TopLogprobs
from agentlightning.store import annotation, drift, generations, senders, transcript
from agentlightning.token_text import TokenTexts

__all__ = ["TokenHtml", "choice_values", "generation_texts", "prompt_tokens", "token_values"]

# A browser lays out and paints only the blocks in view. A block ends at the end of a line, if there is one in time.
MIN_BLOCK, MAX_BLOCK = 256, 768
NANOSECONDS = 1e9
CHARACTERS_SHOWN = 1_000_000
NEIGHBOURS = 8
TOKEN_CHARACTERS = 200
MASK_SHOWN = 50
CALLS_ORDERED = 5_000
ANNOTATIONS_READ = 1_000

PROBABILITIES = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Lower bounds of the first five of the six colours, by a token's probability."""
_BOUNDS = [math.log(each) for each in PROBABILITIES]

_LINE_BREAK = Markup("<i></i>\n")


@dataclass(frozen=True, slots=True)
class TokenHtml:
    """Token ids as HTML.

    Attributes:
        blocks: blocks of some hundred ids, each an element with `data-t="ID LOGPROB"`.
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


@dataclass(frozen=True, slots=True)
class Alternative:
    """An id that could have been at a position, with its probability in percent; `is_own` if it is the one there."""

    id: int
    text: str
    logprob: float
    percent: float
    is_own: bool


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a generation among the calls of its rollout, from 1, with those before and after it."""

    number: int
    count: int
    reward: float | None
    before: str | None
    after: str | None


def choice_values(connection: Connection, generation_id: str, index: int) -> dict[str, Any] | None:
    """Return the values for the template of a generation and one of its choices; None if it does not exist."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    choices = generation.choices
    # A link to a choice that does not exist shows the first.
    choice = next((each for each in choices if each.index == index), choices[0] if choices else None)
    texts = _texts_of(connection, generation_id)
    token_ids, logprobs = (None, None) if choice is None else (choice.token_ids, choice.logprobs)
    return {
        "generation": generation,
        "choice": choice,
        "tokens": None if token_ids is None else _token_html(token_ids, logprobs, texts),
        "summary": None if not logprobs else _summary(logprobs),
        "fields": list(_fields(generation, choice)),
        "parameters": _indented(generation.sampling_params),
        "requested": _indented(generation.requested_params),
        "prompt_length": None if generation.prompt_token_ids is None else len(generation.prompt_token_ids),
        "probabilities": PROBABILITIES,
        "place": _place_of(connection, generation),
        "annotations": _annotations_of(connection, generation),
    }


def prompt_tokens(connection: Connection, generation_id: str) -> TokenHtml | None:
    """Return the tokens of a generation's prompt; None if the generation does not exist."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    texts = _texts_of(connection, generation_id)
    top, ids = generation.prompt_logprobs, generation.prompt_token_ids or array("i")
    return _token_html(ids, None if top is None else _own_logprobs(ids, top), texts)


def generation_texts(connection: Connection, generation_id: str) -> dict[str, Any] | None:
    """Return a generation's prompt and answers as texts; None if the generation does not exist."""
    key = generations.key_of(connection, generation_id)
    for found in transcript.read(connection, [] if key is None else [key]):
        return {"prompt": found.prompt, "answers": found.answers, "most": CHARACTERS_SHOWN}
    return None


def _texts_of(connection: Connection, generation_id: str) -> TokenTexts:
    digest = senders.vocabulary_digest_of(connection, generation_id)
    found = None if digest is None else drift.texts_of(connection, digest)
    return TokenTexts(None) if found is None else found


def _own_logprobs(token_ids: array[int], top: TopLogprobs) -> array[float]:
    """Return the logprob of each id itself; NaN where it has none, as the first of a prompt."""
    found = array("f")
    for token_id, start, end in zip(token_ids, top.offsets, top.offsets[1:], strict=False):
        pairs = zip(top.ids[start:end], top.logprobs[start:end], strict=True)
        found.append(next((logprob for each, logprob in pairs if each == token_id), math.nan))
    return found


def token_values(
    connection: Connection, generation_id: str, index: int, of: Literal["prompt", "answer"], at: int
) -> dict[str, Any] | None:
    """Return the values for the template of one token; None if it does not exist."""
    generation = generations.find(connection, generation_id)
    choice = None if generation is None else next((each for each in generation.choices if each.index == index), None)
    if generation is None or (of == "answer" and choice is None):
        return None
    if of == "prompt" or choice is None:
        ids, top, mask = generation.prompt_token_ids, generation.prompt_logprobs, None
    else:
        ids, top, mask = choice.token_ids, choice.top_logprobs, choice.sampling_mask
    if ids is None or at >= len(ids):
        return None
    texts = _texts_of(connection, generation_id)
    first, last = max(at - NEIGHBOURS, 0), min(at + NEIGHBOURS + 1, len(ids))
    chosen_from = None if mask is None or at >= len(mask) else mask.ids[mask.offsets[at] : mask.offsets[at + 1]]
    return {
        "at": at,
        "neighbours": [(place, ids[place], _short_text(texts, ids[place])) for place in range(first, last)],
        "alternatives": [] if top is None or at >= len(top) else _alternatives(top, at, ids[at], texts),
        "chosen_from": None if chosen_from is None else len(chosen_from),
        "some_of_these": [] if chosen_from is None else [_short_text(texts, each) for each in chosen_from[:MASK_SHOWN]],
    }


def _alternatives(top: TopLogprobs, at: int, own: int, texts: TokenTexts) -> list[Alternative]:
    start, end = top.offsets[at], top.offsets[at + 1]
    pairs = dict(zip(top.ids[start:end], top.logprobs[start:end], strict=True))
    return [
        Alternative(each, _short_text(texts, each), logprob, 100 * math.exp(min(logprob, 0.0)), each == own)
        for each, logprob in sorted(pairs.items(), key=lambda pair: -pair[1])
    ]


def _short_text(texts: TokenTexts, token_id: int) -> str:
    """Return the text of an id, or the beginning of one that no model has."""
    return texts.text(token_id)[:TOKEN_CHARACTERS]


def _place_of(connection: Connection, generation: Generation) -> Place | None:
    """Find the place of a generation among the calls of its rollout; None if they are too many to look through."""
    rollout_id = generation.rollout_id
    if rollout_id is None or sum(generations.tally(connection, {"rollout_id": rollout_id}).values()) > CALLS_ORDERED:
        return None
    positions = transcript.outline_of(connection, rollout_id).positions
    at = next((at for at, each in enumerate(positions) if each.id == generation.id), None)
    if at is None:
        return None
    before = positions[at - 1].id if at else None
    after = positions[at + 1].id if at + 1 < len(positions) else None
    return Place(at + 1, len(positions), positions[at].reward, before, after)


def _annotations_of(connection: Connection, generation: Generation) -> list[annotation.Annotation]:
    if generation.rollout_id is None:
        return []
    found = annotation.of_rollout(connection, generation.rollout_id, ANNOTATIONS_READ)
    return [each for each in found if each.generation_id == generation.id]


def _token_html(token_ids: array[int], logprobs: array[float] | None, texts: TokenTexts) -> TokenHtml:
    return TokenHtml(list(_blocks(token_ids, logprobs, texts)), len(token_ids), texts.are_known)


def _blocks(token_ids: array[int], logprobs: array[float] | None, texts: TokenTexts) -> Iterator[Markup]:
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
        if logprobs is None or place >= len(logprobs) or math.isnan(logprobs[place]):
            block.append(f'<b class="t{special}" data-t="{token_id}">{text}</b>')
        else:
            logprob = logprobs[place]
            values = f'data-t="{token_id} {logprob:.5g}"'
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
        "Routed experts": choice and _experts(choice),
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


def _experts(choice: Choice) -> str | None:
    if choice.routed_experts is None:
        return None
    ids, layers, experts = choice.routed_experts.shape
    return f"{experts} in each of {layers} layers, of {ids} ids"


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
