"""Causes why a prompt does not go on where the model stopped: a pure function of two sequences of ids and a vocabulary.

Nothing is known of the chat template. Its special tokens cut both sequences into turns; up to the first difference
these are the same, so the turns that differ first are compared: as texts, without reasoning, with tool calls as JSON.
What explains the difference, from the strictest explanation on, is its cause. All of it takes linear time.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from agentlightning.common_prefix import ID_BYTES, common_ids
from agentlightning.drift._causes import Cause
from agentlightning.drift._content import (
    are_same_parts,
    characters,
    defines_tools,
    parts_of,
    similarity_of,
    split_header,
    thoughts_in,
    without_thoughts,
    without_tools,
)
from agentlightning.drift._turns import boundaries_in, bounds, find_ids, ids_array, next_of, turn_names, turn_start
from agentlightning.token_text import TokenTexts

__all__ = [
    "SHORT_TURN",
    "Difference",
    "classify",
    "continues",
]

_ROLE = re.compile(r"\s*(system|user|assistant|tool|developer|ipython|model|observation)\b")
_ROLES_WRITTEN = ("assistant", "model")
_ROLE_OF_TOKEN = {
    "[INST]": "user",
    "[/INST]": "assistant",
    "[AVAILABLE_TOOLS]": "tools",
    "[TOOL_RESULTS]": "tool",
    "[/TOOL_RESULTS]": "assistant",
    "[SYSTEM_PROMPT]": "system",
    "<\N{FULLWIDTH VERTICAL LINE}User\N{FULLWIDTH VERTICAL LINE}>": "user",
    "<\N{FULLWIDTH VERTICAL LINE}Assistant\N{FULLWIDTH VERTICAL LINE}>": "assistant",
}
_SUMMARY = re.compile(r"\b(?:summar|compact|condens|earlier conversation|continued from)", re.IGNORECASE)
# More turns than this that a template moves are named as one.
MOST_MOVED = 64
# Share of a text that is the same at both its ends, from which on it is the same text, changed.
SIMILAR = 0.5
SHORT_TURN = 4
ROLE_IDS = 16
HEAD_IDS = 1_024
# Characters at the end of a part that may be cut differently.
HEAD_CHARACTERS_LEFT = 64


@dataclass(frozen=True, slots=True)
class Difference:
    """The cause why a prompt differs from the context that it should extend, and the place where it first does.

    Attributes:
        is_certain: whether what both sides have in common leaves no other explanation.
        position: number of ids with which both begin.
        message: number of the message, from 0, in which they differ first; None where the ids alone are known.
        role: the role of that message, where the template writes one.
        also: what would still break it once the cause is gone.
        special_before, special_after: number of special tokens of the turn on each side.
    """

    cause: Cause
    is_certain: bool
    position: int
    message: int | None = None
    role: str | None = None
    also: tuple[Cause, ...] = ()
    special_before: int = 0
    special_after: int = 0


def classify(
    before: Sequence[int],
    answer_start: int,
    prompt: Sequence[int],
    texts: TokenTexts | None,
    texts_before: TokenTexts | None = None,
) -> Difference:
    """Find why a prompt does not begin with an earlier call's prompt and answer.

    Args:
        before: ids of the earlier prompt, and of its answer.
        answer_start: where the answer begins in it.
        prompt: ids of the prompt.
        texts: the texts of the prompt's ids; None where its vocabulary is unknown.
        texts_before: those of the earlier ids, where they are of another vocabulary.
    """
    first, second = ids_array(before), ids_array(prompt)
    position = common_ids(first.tobytes(), second.tobytes())
    if texts is None or not texts.are_known or (texts_before is not None and not texts_before.are_known):
        return _by_ids(answer_start, second, position)
    if texts_before is not None and texts_before is not texts:
        return _by_texts(first, second, texts_before, texts, position)
    return _Comparison(first, answer_start, second, texts, position).difference()


def continues(before: Sequence[int], answer_start: int, prompt: Sequence[int], texts: TokenTexts) -> bool:
    """Tell whether a prompt goes on behind an earlier call's prompt and answer, whatever was changed in them."""
    first, second = ids_array(before), ids_array(prompt)
    position = common_ids(first.tobytes(), second.tobytes())
    return _Comparison(first, answer_start, second, texts, position).continues()


def _by_ids(answer_start: int, prompt: array[int], position: int) -> Difference:
    """Say what the ids alone tell."""
    if position == len(prompt) == answer_start:
        return Difference("retry", True, position)
    # Prompts of two conversations may begin alike for long, and their turns are not known.
    return Difference("other" if position >= answer_start else "sub_agent", False, position)


def _by_texts(
    before: array[int], prompt: array[int], texts_before: TokenTexts, texts: TokenTexts, position: int
) -> Difference:
    """Compare ids of two vocabularies, which have nothing but their texts in common."""
    if texts.join(prompt).startswith(texts_before.join(before)):
        return Difference("retokenised", True, position)
    return Difference("other", False, position)


class _Comparison:
    """Two sequences of one vocabulary, and the turns in which they differ first."""

    def __init__(
        self, before: array[int], answer_start: int, prompt: array[int], texts: TokenTexts, position: int
    ) -> None:
        self._before, self._prompt = before, prompt
        self._texts, self._position = texts, position
        self._answer_start = answer_start
        boundaries = boundaries_in(texts)
        self._is_answer = position >= answer_start or not any(
            each in boundaries for each in before[position:answer_start]
        )
        start = min(position, answer_start) if self._is_answer else position
        self._start = start = turn_start(before, start, texts)
        self._end_after = next_of(prompt, max(position, start), boundaries)
        self._end_before = next_of(before, max(position, start), boundaries)
        if self._is_answer:
            # Its turn is all of it, whatever special tokens the model sampled.
            self._end_before = len(before) - (bool(before) and before[-1] in boundaries and len(before) > answer_start)
        self._message, self._has_answer_before = self._messages_before()
        self._text_before = texts.join(before[start : self._end_before])
        self._text_after = texts.join(prompt[start : self._end_after])

    def difference(self) -> Difference:
        """Name the cause by the first explanation that fits."""
        for explain in (self._retry, self._turn, self._special, self._apart, self._moved, self._conversation):
            if (found := explain()) is not None:
                return found
        return self._named("other", False)

    def _named(self, cause: Cause, is_certain: bool, also: tuple[Cause, ...] = ()) -> Difference:
        special = self._texts.special
        return Difference(
            cause,
            is_certain,
            self._position,
            self._message,
            self._role(),
            also,
            sum(each in special for each in self._before[self._start : self._end_before + 1]),
            sum(each in special for each in self._prompt[self._start : self._end_after + 1]),
        )

    def _messages_before(self) -> tuple[int, bool]:
        """Count the messages before this one, which have more than white space in them; tell if one is an answer."""
        text = self._texts.text
        count, has_answer, opened = 0, False, 0
        for end in bounds(self._before[: self._start], self._texts):
            if not all(text(each).isspace() for each in self._before[opened:end]):
                count += 1
                opener = text(self._before[opened - 1]) if opened else ""
                found = _ROLE.match(self._texts.join(self._before[opened : min(opened + ROLE_IDS, end)]))
                has_answer |= (found[1] if found else _ROLE_OF_TOKEN.get(opener)) in _ROLES_WRITTEN
            opened = end + 1
        return count, has_answer

    def _role(self) -> str | None:
        if found := _ROLE.match(self._text_before) or _ROLE.match(self._text_after):
            return found[1]
        opener = self._texts.text(self._before[self._start - 1]) if self._start else ""
        return _ROLE_OF_TOKEN.get(opener) or ("assistant" if self._is_answer else None)

    def _retry(self) -> Difference | None:
        is_same = self._position == len(self._prompt) == self._answer_start
        return self._named("retry", True) if is_same else None

    def _turn(self) -> Difference | None:
        """Explain the difference by the turn alone."""
        one, other = self._text_before, self._text_after
        ends_alike = self._boundary_before() in (None, self._boundary_after())
        if one == other or self._is_cut_short():
            if self._position < max(self._end_before, self._end_after):
                return self._named("retokenised", True)
            return None if ends_alike or not self._is_of_model() else self._named("answer_end", True)
        if not self._is_of_model():
            return None
        # Half a character at the end of an answer is never sent.
        if characters(one) == characters(other):
            return self._named("retokenised", True)
        header_before, content_before = split_header(one)
        header_after, content_after = split_header(other)
        is_same = characters(content_before).strip() == characters(content_after).strip()
        if header_before.strip() != header_after.strip():
            return self._named("template", True) if is_same and content_before.strip() else None
        if is_same:
            return self._named("answer_end", True)
        return self._by_content(content_before, content_after)

    def _is_of_model(self) -> bool:
        return self._is_answer or self._role() in _ROLES_WRITTEN

    def _is_cut_short(self) -> bool:
        """Tell whether an answer that reached its limit is continued as text."""
        return (
            self._is_answer
            and self._boundary_before() is None
            and bool(self._text_before)
            and self._text_after.startswith(self._text_before)
        )

    def _by_content(self, before: str, after: str) -> Difference | None:
        """Compare answers without reasoning, and with tool calls as JSON."""
        rest_before, rest_after = without_thoughts(before), without_thoughts(after)
        parts_before, parts_after = parts_of(rest_before), parts_of(rest_after)
        is_same = rest_before.strip() == rest_after.strip()
        if not is_same and not are_same_parts(parts_before, parts_after):
            if not self._is_stopped(rest_before, rest_after):
                return None
            has_other_thoughts = thoughts_in(before) != thoughts_in(after)
            return (
                self._named("reasoning", True, ("answer_end",))
                if has_other_thoughts
                else self._named("answer_end", False)
            )
        calls: tuple[Cause, ...] = () if is_same else ("tool_call",)
        if thoughts_in(before) != thoughts_in(after):
            return self._named("reasoning", True, calls)
        return self._named("tool_call", True) if calls else None

    def _is_stopped(self, before: str, after: str) -> bool:
        """Tell whether a string stopped the answer, perhaps: it has no stop token, and the history lacks its end."""
        is_open = self._is_answer and self._boundary_before() is None
        return is_open and bool(after.strip()) and before.lstrip().startswith(after.strip())

    def _special(self) -> Difference | None:
        """Explain it by special tokens: without them, the prompt begins with what came before."""
        # A short part first: of most other differences it is enough.
        for length in (HEAD_IDS, len(self._before)):
            # The same text may take more ids.
            one, other = self._plain(self._before, length), self._plain(self._prompt, 2 * length)
            if length < len(self._before):
                one = one[:-HEAD_CHARACTERS_LEFT]
            if not characters(other).startswith(characters(one)):
                return None
        if not one.strip() and self._is_answer and self._boundary_before() is not None:
            return self._named("answer_end", True)
        return self._named("template", True) if one.strip() or self._position < self._answer_start else None

    def _plain(self, ids: array[int], length: int) -> str:
        """Return the text of so many ids from the first difference on, without special tokens."""
        special = self._texts.special
        return self._texts.join(each for each in ids[self._position : self._position + length] if each not in special)

    def _apart(self) -> Difference | None:
        """Tell another conversation, which only begins as this one did."""
        if self._position >= self._answer_start or self.continues():
            return None
        if self._message and self._role() == "user" and (found := self._compaction()) is not None:
            return found
        similarity = similarity_of(self._text_before, self._text_after)
        return self._named("sub_agent", (not self._message and similarity < SIMILAR) or self._has_other_tools())

    def continues(self) -> bool:
        """Tell whether the prompt goes on: it has the answer, or more turns than the prompt before and some of these.

        Another conversation may have more turns, too, as one with examples in front has.
        """
        if self._position >= self._answer_start:
            return True
        answer = turn_start(self._before, self._answer_start, self._texts)
        # The last of a prompt is the beginning of an answer.
        turns = turn_names(self._prompt[self._start :], self._texts)[:-1]
        before = turn_names(self._before[self._start : answer], self._texts)
        said = turn_names(self._before[answer:], self._texts)[:1]
        if not {*said}.isdisjoint(turns):
            return True
        if len(turns) <= len(before):
            return False
        later = self._messages(before[1:])
        if not {*later}.isdisjoint(turns):
            return True
        rest = self._text_after.strip()
        # A template may have moved what stood in front of the question.
        if not later and rest and self._text_before.strip().endswith(rest):
            return True
        # Headers and questions may all have changed, as those with the time or the state of a session do.
        return any(self._is_same_answer(each, turn) for each in said for turn in turns)

    def _is_same_answer(self, said: bytes, turn: bytes) -> bool:
        """Tell whether a turn is the answer, but for its reasoning, the form of its tool calls, and its ends."""
        one, other = (
            without_thoughts(split_header(self._texts.join(array("i", each)))[1]).strip() for each in (said, turn)
        )
        return bool(one) and (characters(one) == characters(other) or are_same_parts(parts_of(one), parts_of(other)))

    def _compaction(self) -> Difference | None:
        """Look for a history with fewer turns, some of them kept; a summary may as well be asked of another text."""
        before = turn_names(self._before[self._end_before : self._answer_start], self._texts)
        after = turn_names(self._prompt[self._end_after :], self._texts)
        if len(after) >= len(before):
            return None
        has_kept = bool({*self._messages(before)} & {*after[:-1]})
        return self._named("compaction", has_kept) if has_kept or _SUMMARY.search(self._text_after) else None

    def _moved(self) -> Difference | None:
        """Look for what stands further behind now, such as tools or a system prompt behind the last message."""
        if self._is_answer:
            return None
        front = self._text_before.removesuffix(self._text_after.strip()).strip()
        is_shorter = front and len(front) < len(self._text_before.strip())
        if is_shorter and not self._is_of_model() and front in self._texts.join(self._prompt[self._end_after :]):
            return self._named("template", True)
        whole = self._prompt.tobytes()
        cut, moved = self._before[:], 0
        limit = self._answer_start
        position = self._position
        boundaries = boundaries_in(self._texts)
        while moved < MOST_MOVED and position < limit:
            start = turn_start(cut, position + (cut[position] in boundaries), self._texts)
            end = next_of(cut, start, boundaries)
            # With what stands between it and the next turn.
            stop = next_of(cut, end + 1, boundaries)
            if stop > limit or end - start < 2:
                break
            turn = cut[start : end + 1].tobytes()
            if find_ids(whole, turn, position) < 0:
                break
            rest = cut[start:limit].tobytes()
            if not moved and 0 <= find_ids(whole, rest, position) < len(whole) - len(rest):
                # All of it is there, behind something new, and goes on.
                return self._named("header", False)
            opener = start - 1 if start else start
            del cut[opener:stop]
            limit -= stop - opener
            moved += 1
            position = common_ids(cut.tobytes(), whole)
        if not moved:
            return None
        if position == len(cut):
            return self._named("template", True)
        left = _Comparison(cut, limit, self._prompt, self._texts, position).difference()
        return self._named("template", True, (left.cause, *left.also))

    def _conversation(self) -> Difference | None:
        """Explain it by what the turns after the first difference have in common."""
        turns_before = turn_names(self._before[self._end_before :], self._texts)
        turns_after = turn_names(self._prompt[self._end_after :], self._texts)
        # The last of a prompt is the beginning of an answer.
        known = {*turns_after[:-1]}
        has_kept = any(each in known for each in self._messages(turns_before))
        # A call beside the conversation may have the same question, as one for a title has.
        has_answer = bool(turns_before) and turns_before[-1] in known
        similarity = similarity_of(self._text_before, self._text_after)
        has_other_tools = self._has_other_tools()
        if has_other_tools and (has_answer or not self._has_tools_alone() or self._is_first_same()):
            return self._named("tools", True)
        if self._is_of_model():
            return self._other_answer(turns_after)
        if has_kept and (has_answer or similarity > SIMILAR) and len(turns_after) >= len(turns_before) - 1:
            return None if self._has_answer_before else self._named("header", has_answer and similarity > SIMILAR)
        is_shorter = bool(self._message) and len(self._prompt) < len(self._before)
        if is_shorter and self._role() == "user" and (has_kept or _SUMMARY.search(self._text_after)):
            return self._named("compaction", has_kept)
        if not self._has_answer_before and not has_answer:
            is_longer = similarity > SIMILAR and len(turns_after) >= len(turns_before)
            if is_longer or any(self._is_same_answer(turns_before[-1], each) for each in known if turns_before):
                return self._named("header", False)
            is_apart = not self._message and similarity < SIMILAR
            return self._named("sub_agent", is_apart or has_other_tools)
        return None

    def _messages(self, turns: Sequence[bytes]) -> list[bytes]:
        """Leave out turns that any conversation has, such as a line feed, and tools, which other agents have, too."""
        return [
            each
            for each in turns
            if len(each) > SHORT_TURN * ID_BYTES and not defines_tools(self._texts.join(array("i", each)))
        ]

    def _is_first_same(self) -> bool:
        """Tell whether the first message behind the tools is the same."""
        one = self._messages(turn_names(self._before[self._start :], self._texts))
        other = self._messages(turn_names(self._prompt[self._start :], self._texts))
        return bool(one) and one[:1] == other[:1]

    def _has_tools_alone(self) -> bool:
        return defines_tools(self._text_before) or defines_tools(self._text_after)

    def _other_answer(self, turns_after: Sequence[bytes]) -> Difference | None:
        """Explain another answer in the place of the model's own."""
        role, role_after = _ROLE.match(self._text_before), _ROLE.match(self._text_after)
        if role is not None and (role_after is None or role_after[1] != role[1]):
            # It is not there at all.
            return None
        # Headers are always the same, and how long the model has thought says nothing of the answer.
        one, other = (split_header(each)[1] for each in (self._text_before, self._text_after))
        similarity = similarity_of(without_thoughts(one).strip(), without_thoughts(other).strip())
        # Where much of it is the same, a change that is not known here may be the reason.
        is_changed = similarity >= SIMILAR / 2
        if is_changed and thoughts_in(one) != thoughts_in(other):
            return self._named("reasoning", False, ("foreign",))
        return self._named("foreign", bool(turns_after) and not is_changed)

    def _has_other_tools(self) -> bool:
        tokens = [
            self._texts.text(side[start])
            for side in (self._before, self._prompt)
            for start in (self._start - 1, self._position)
            if 0 <= start < len(side)
        ]
        if "[AVAILABLE_TOOLS]" in tokens:
            return True
        if self._is_of_model():
            return False
        if defines_tools(self._text_before) != defines_tools(self._text_after):
            return True
        one, tools = without_tools(self._text_before)
        other, other_tools = without_tools(self._text_after)
        return tools != other_tools and one.strip() == other.strip()

    def _boundary_before(self) -> int | None:
        return self._before[self._end_before] if self._end_before < len(self._before) else None

    def _boundary_after(self) -> int | None:
        return self._prompt[self._end_after] if self._end_after < len(self._prompt) else None
