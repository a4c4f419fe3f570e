"""Conversations that go on from exact ids, without vLLM: a chat template, and a model that says what it is told to."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentlightning.continuation import (
    CONTINUED,
    NO_MATCH,
    Answer,
    Call,
    Histories,
    Rendered,
    find_seam,
    fingerprints,
    stand_in_for,
    with_reasoning,
)
from tests.common.templates import rendered

END = 2
"""The id of the token that ends a turn."""


@dataclass
class Served:
    """A server of one template, whose model samples characters: an id is a character, but for the end of a turn.

    Attributes:
        keep: go on from reasoning that the template leaves out.
        end: the text of the token that ends a turn.
        counts: only count, as `AGL_CONTINUE=report` does: by what the template has made of the messages alone.
    """

    template: str
    keep: bool = False
    end: str = "<|im_end|>"
    counts: bool = False

    def __post_init__(self) -> None:
        self.histories = Histories(1 << 20)

    def call(
        self,
        messages: Sequence[Any],
        said: str,
        answer: Answer,
        *,
        ended: bool = True,
        is_open: bool = False,
        key: str = "ro-1",
        **options: Any,
    ) -> tuple[str, str]:
        """Answer a request with these characters; return what its prompt came to, and that prompt as text."""
        result, ids, continued, text = self._prompt(messages, key, options)
        response = array("i", map(ord, said))
        if ended:
            response.append(END)
        shared = len(continued.token_ids()) if continued else 0
        call = Call(
            len(messages),
            Rendered.of(text),
            array("i", ids[shared:]),
            response,
            [END],
            ended,
            None,
            continued,
            [answer],
            is_open,
        )
        self.histories.add(key, fingerprints(messages)[-1], call)
        return result, self._text(ids)

    def _prompt(self, messages: Sequence[Any], key: str, options: Any) -> tuple[str, list[int], Call | None, str]:
        own = rendered(self.template, messages, **options)
        match = self.histories.find(key, messages, fingerprints(messages), lambda call: call.answers or ())
        if match is None:
            return NO_MATCH, self._ids(own), None, own
        place = match.call.position
        reasoned = with_reasoning(messages, match.call.reasoning(match.answer))
        whole = rendered(self.template, reasoned, **options)
        other = None
        if not self.counts or reasoned is not messages:
            before = [*reasoned[: place + 1], stand_in_for(messages[place + 1])]
            other = rendered(self.template, before, answers=False, **options)
        seam = find_seam(whole, other, match, messages[place], {END: self.end}, self.keep)
        if isinstance(seam, str):
            return seam, self._ids(own), None, own
        new = self._ids(whole[seam.end :])
        added = self._ids(whole[seam.start : seam.end])
        ids = match.call.token_ids() + added + (new[1:] if match.call.ended else new)
        return CONTINUED, ids, match.call, whole

    def _ids(self, text: str) -> list[int]:
        first, *others = text.split(self.end)
        ids = [*map(ord, first)]
        for other in others:
            ids += (END, *map(ord, other))
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(self.end if each == END else chr(each) for each in ids)
