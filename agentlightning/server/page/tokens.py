"""One generation: each of its token ids laid out as the text that it stands for."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from sqlalchemy import Connection

from agentlightning.generation import Choice, Generation
from agentlightning.server.page.pieces import Pieces
from agentlightning.store import generations, senders

__all__ = ["Text", "of_choice", "of_prompt"]

# A browser lays out and paints only the blocks that are in sight. They end where a line does, if one does in time.
FEWEST_IN_BLOCK, MOST_IN_BLOCK = 256, 768
NANOSECONDS = 1e9

LIKELY = (0.9, 0.5, 0.2, 0.05, 0.01)
"""From which probability on a token has the first, second, ... of the six colours."""
_BOUNDS = [math.log(each) for each in LIKELY]

_LINE_BREAK = Markup("<i></i>\n")


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, as HTML.

    Attributes:
        blocks: each some hundred ids, every one an element: `data-t` has the id, and after it the logprob.
        length: how many ids.
        are_known: whether it is known what they stand for.
    """

    blocks: Sequence[Markup]
    length: int
    are_known: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """What logprobs are like, all in all: the plot in words."""

    mean: float
    lowest: float
    lowest_at: int


def of_choice(connection: Connection, generation_id: str, index: int) -> dict[str, Any] | None:
    """What the page of a generation shows of this choice of it; None where there is no such generation."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    choices = generation.choices
    # A link to a choice that is none leads to the first.
    choice = next((each for each in choices if each.index == index), choices[0] if choices else None)
    pieces = Pieces(senders.vocabulary_of(connection, generation_id))
    logprobs = None if choice is None else choice.logprobs
    return {
        "generation": generation,
        "choice": choice,
        "text": None if choice is None or choice.token_ids is None else _laid_out(choice.token_ids, logprobs, pieces),
        "summary": None if not logprobs else _summary(logprobs),
        "fields": list(_fields(generation, choice)),
        "parameters": _indented(generation.sampling_params),
        "prompt_length": None if generation.prompt_token_ids is None else len(generation.prompt_token_ids),
        "likely": LIKELY,
    }


def of_prompt(connection: Connection, generation_id: str) -> Text | None:
    """The prompt of a generation; None where there is no such generation."""
    generation = generations.find(connection, generation_id)
    if generation is None:
        return None
    pieces = Pieces(senders.vocabulary_of(connection, generation_id))
    return _laid_out(generation.prompt_token_ids or array("i"), None, pieces)


def _laid_out(token_ids: array[int], logprobs: array[float] | None, pieces: Pieces) -> Text:
    return Text(list(_blocks(token_ids, logprobs, pieces)), len(token_ids), pieces.are_known)


def _blocks(token_ids: array[int], logprobs: array[float] | None, pieces: Pieces) -> Iterator[Markup]:
    block: list[str] = []
    # A long answer has the same ids again and again.
    written: dict[int, tuple[Markup, bool]] = {}
    for place, token_id in enumerate(token_ids):
        if token_id not in written:
            text = pieces.text(token_id)
            written[token_id] = _with_breaks(text), text.endswith("\n")
        text, ends_line = written[token_id]
        # By hand: of a long answer a template would take as long as all the rest.
        special = " s" if pieces.is_special(token_id) else ""
        if logprobs is None or place >= len(logprobs):
            block.append(f'<b class="t{special}" data-t="{token_id}">{text}</b>')
        else:
            logprob = logprobs[place]
            block.append(f'<b class="t l{_colour(logprob)}{special}" data-t="{token_id} {logprob:.5g}">{text}</b>')
        if len(block) >= MOST_IN_BLOCK or (ends_line and len(block) >= FEWEST_IN_BLOCK):
            yield Markup("".join(block))
            block = []
    if block:
        yield Markup("".join(block))


def _with_breaks(text: str) -> Markup:
    """The text, with a mark that can be seen at each end of a line, and that nobody copies."""
    return escape(text).replace("\n", _LINE_BREAK)


def _colour(logprob: float) -> int:
    return next((place for place, bound in enumerate(_BOUNDS) if logprob >= bound), len(_BOUNDS))


def _summary(logprobs: array[float]) -> Summary | None:
    # An engine that has gone wrong has some that are no numbers.
    known = [place for place, each in enumerate(logprobs) if not math.isnan(each)]
    if not known:
        return None
    lowest = min(known, key=logprobs.__getitem__)
    return Summary(sum(logprobs[place] for place in known) / len(known), logprobs[lowest], lowest)


def _fields(generation: Generation, choice: Choice | None) -> Iterator[tuple[str, object]]:
    """What else is known of it; what is not is left out."""
    started, first, finished = generation.started_at, generation.first_token_at, generation.finished_at
    found: dict[str, object] = {
        "Status": generation.status,
        "Model": generation.model,
        "Endpoint": generation.endpoint,
        "Finish reason": choice and choice.finish_reason,
        "Stop reason": choice and choice.stop_reason,
        "Prompt tokens": None if generation.prompt_token_ids is None else len(generation.prompt_token_ids),
        "Of these from the cache": generation.cached_tokens,
        "Output tokens": None if choice is None or choice.token_ids is None else len(choice.token_ids),
        "Until the first token": first and started and f"{(first - started) / NANOSECONDS:.3f} s",
        "Until the last": started and f"{(finished - started) / NANOSECONDS:.3f} s",
        "Logprobs": generation.logprobs_mode,
        "Weights": choice and ", ".join(map(_version, choice.weight_versions or ())),
        "Attempt": generation.attempt_id,
        "Session": generation.session_id,
        "Trace": generation.trace_id,
        "Answer's id": generation.response_id,
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
        # Whoever writes generations by a way of their own may have others.
        return sampling_params
