"""The prompt of a chat request: that which goes on from an earlier call's exact ids, or the reason for vLLM's own."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agentlightning import continuation
from agentlightning.continuation import Answer, Call, Match, Rendered
from agentlightning.instrumentation.vllm.capture.conversion import CapturedRequest
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.continuation import kept
from agentlightning.instrumentation.vllm.continuation.chats import Chat
from agentlightning.instrumentation.vllm.continuation.parsing import Said

__all__ = ["Conversation", "Exact", "Turn", "is_plain", "keep", "note_finished", "special_ids", "whole_text"]


@dataclass(slots=True)
class Turn:
    """A chat prompt that the engine was given, until it has answered.

    Attributes:
        key: whose it is.
        position: the number of its messages.
        fingerprint: that of all of them.
        kind: a digest of what has to be equal beside the messages.
        parsed_as: how its answer is parsed: by which of these tool choices, and whether to one tool call at most.
        rendered: the template's text.
        continued: the call that it continues, or would, and the ids that its exact prompt adds to that call's.
        prompt_token_ids: vLLM's own list.
    """

    key: Hashable
    position: int
    fingerprint: bytes
    kind: bytes
    parsed_as: tuple[Sequence[Any], bool]
    rendered: Rendered
    continued: Call | None = None
    more: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()


class Exact(NamedTuple):
    """A prompt that goes on from a call.

    Attributes:
        call: that call.
        more: the ids that follow those of its prompt and its answer.
        rendered: the template's text, with the reasoning that the model wrote.
    """

    call: Call
    more: list[int]
    rendered: Rendered

    def ids(self) -> list[int]:
        """Return all ids of the prompt."""
        return [*self.call.token_ids(), *self.more]


@dataclass(slots=True)
class Conversation:
    """The messages of a chat request, or their beginning.

    Attributes:
        key: whose they are.
        kind: a digest of what has to be equal beside them.
        fingerprints: those of the messages.
        own: the text that the template makes of them.
        rendered: describes it.
    """

    chat: Chat
    key: Hashable
    kind: bytes
    messages: Sequence[Any]
    fingerprints: Sequence[bytes]
    own: str
    rendered: Rendered

    @classmethod
    def of(cls, chat: Chat, key: Hashable) -> Conversation:
        """Return all messages of a request.

        Raises:
            NotText: they are not only text.
        """
        fingerprints = continuation.fingerprints(chat.messages)
        return cls(chat, key, _kind(chat), chat.messages, fingerprints, chat.own, Rendered.of(chat.own))

    def turn(self) -> Turn:
        """Return the turn of vLLM's own prompt."""
        request = self.chat.request
        return Turn(
            self.key,
            len(self.messages),
            self.fingerprints[-1],
            self.kind,
            ((getattr(request, "tool_choice", None),), getattr(request, "parallel_tool_calls", None) is False),
            self.rendered,
        )

    async def up_to(self, position: int) -> Conversation:
        """Return the first of the messages, as a request of their own."""
        messages = self.messages[:position]
        own = await self.chat.render(messages)
        fingerprints = self.fingerprints[: position + 1]
        return Conversation(self.chat, self.key, self.kind, messages, fingerprints, own, Rendered.of(own))

    def match(self) -> Match | None:
        """Return the call that the messages continue."""
        return kept.calls().find(self.key, self.messages, self.fingerprints, self.answers_of, self.kind)

    def is_of_other_kind(self, position: int) -> bool:
        """Tell whether the known calls with the messages up to an answer are all of other kinds."""
        return kept.calls().has_of_other_kind(self.key, self.fingerprints[position], self.kind)

    def answers_of(self, call: Call) -> list[Answer]:
        """Return what a client may have been told of a call's answer."""
        said: Said = call.said
        parsers = self.chat.parsers
        return parsers.answers(self.chat.request, said, call.prompt(), call.response_token_ids.tolist())

    async def go_on(self, match: Match) -> Exact | str:
        """Return the prompt that goes on from a call, or the reason why there is none."""
        chat, whole, call = self.chat, self.own, match.call
        place = call.position
        messages = continuation.with_reasoning(self.messages, call.reasoning(match.answer))
        # Where prompts are only counted, what vLLM has rendered and tokenised has to do, but for the first of a shape.
        shape = self._shape(match)
        is_counted = chat.own_ids is not None and messages is self.messages and kept.is_proved(shape)
        stand_in = None
        try:
            if messages is not self.messages:
                whole = await chat.render(messages)
                if whole == self.own and match.answer.reasoning.strip() and not _keeps_reasoning():
                    return continuation.REASONING_DROPPED
            if not is_counted:
                before = [*messages[: place + 1], continuation.stand_in_for(messages[place + 1])]
                stand_in = await chat.render(before, answers=False)
        except Exception:
            # The template takes what the client has sent, and not this: it looks at more than it appends.
            return continuation.NOT_APPEND_ONLY
        ends = self._ends_of(call)
        seam = continuation.find_seam(whole, stand_in, match, messages[place], ends, _keeps_reasoning(), self._read())
        if isinstance(seam, str):
            return seam
        kept.note_proved(shape)
        # From the token that ends a turn on, a text is tokenised by itself as it is with what comes before.
        try:
            new = self._own_from(seam.end, seam.end_id, ends) if is_counted else await chat.tokenise(whole[seam.end :])
        except Exception:
            # vLLM refuses a text that alone is longer than what the model takes.
            return continuation.TOO_LONG
        if new[:1] != [seam.end_id]:
            return continuation.SEAM
        more = new[1:] if call.ended else new
        if match.added:
            added = await chat.tokenise(whole[seam.start : seam.end])
            if not self._reads_as(call, added, whole[seam.start : seam.end]):
                return continuation.SEAM
            more = [*added, *more]
        # An answer takes one at least.
        if chat.limit is not None and call.length + len(more) >= chat.limit:
            return continuation.TOO_LONG
        exact = Exact(call, more, self.rendered if whole is self.own else Rendered.of(whole))
        return continuation.PARSER if await self._is_parsed_otherwise(exact, new) else exact

    def _shape(self, match: Match) -> Hashable:
        """Return what a template may look at when it writes an answer and what follows, beside their texts."""
        answer, follows = match.answer, self.messages[match.call.position + 1]
        others = bool(answer.tool_calls), bool(answer.reasoning), bool(match.added), continuation.is_marked(follows)
        return self.kind, follows["role"], *others

    def _own_from(self, start: int, end_id: int, ends: Mapping[int, str]) -> list[int]:
        """Return the ids of vLLM's own prompt from the token on that is there in its text."""
        ids = self.chat.own_ids
        assert ids is not None
        left = self.own.count(ends[end_id], start)
        for place in range(len(ids) - 1, -1, -1):
            left -= ids[place] == end_id
            if not left:
                return ids[place:]
        return []

    def _reads_as(self, call: Call, added: list[int], text: str) -> bool:
        """Tell whether ids behind a call's answer are this text there: some tokenizers begin each text with a space."""
        decode = self.chat.tokenizer.decode
        said = call.response_token_ids.tolist()
        return decode([*said, *added]) == decode(said) + text

    def _ends_of(self, call: Call) -> Mapping[int, str]:
        tokenizer = self.chat.tokenizer
        # A client may stop at any token, and that of a word says nothing about turns.
        tokens = special_ids(tokenizer).intersection(call.ends)
        return {each: chr(each) if self.chat.as_ids else tokenizer.convert_ids_to_tokens(each) for each in tokens}

    def _read(self) -> Callable[[str], str]:
        decode = self.chat.tokenizer.decode
        return (lambda part: decode([*map(ord, part)])) if self.chat.as_ids else str

    async def _is_parsed_otherwise(self, exact: Exact, new: list[int]) -> bool:
        """Tell whether the answer to the exact ids would be parsed otherwise than that to vLLM's own prompt.

        Some parsers look for the end of the answer's reasoning in all of the prompt. Most do not, and vLLM's own
        prompt, which may be long, is not tokenised for them.
        """
        chat = self.chat
        if not chat.parsers.look_at_prompts:
            return False
        has_ended = chat.parsers.is_reasoning_end(chat.request, exact.ids())
        if has_ended == chat.parsers.is_reasoning_end(chat.request, new):
            return False
        return has_ended != chat.parsers.is_reasoning_end(chat.request, await chat.tokenise(self.own, is_whole=True))


def is_plain(chat: Chat) -> bool:
    """Tell whether a request's prompt may be another one than vLLM's: no option of it refers to its text."""
    request, (_, options) = chat.request, chat.options
    return (
        not chat.is_truncated()
        and options.get("add_generation_prompt", True)
        and not options.get("continue_final_message", False)
        and not getattr(request, "echo", False)
        and not getattr(request, "use_beam_search", False)
        and getattr(request, "prompt_logprobs", None) is None
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that no text of a user is tokenised to."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _keeps_reasoning() -> bool:
    return session.settings.continue_reasoning == "keep"


def _kind(chat: Chat) -> bytes:
    """Return a digest of what has to be equal beside the messages: model or adapter, template, its arguments, tools."""
    # Requests of one interface have no such option, and no special tokens are added for them.
    adds_special_tokens = bool(getattr(chat.request, "add_special_tokens", False))
    options = [chat.request.model, adds_special_tokens, *chat.options]
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=repr).encode()).digest()


def note_finished(captured: CapturedRequest) -> None:
    """Keep a request to the engine, which has answered it, for the call that continues it."""
    prompt = captured.prompt_token_ids
    if captured.context is None or not prompt:
        return
    turn = next((turn for turn in captured.context.turns if turn.prompt_token_ids in (prompt,)), None)
    if turn is None:
        return
    params = captured.sampling_params
    for choice in captured.finished:
        detokenizer = choice.state.detokenizer
        text = whole_text(
            getattr(detokenizer, "output_text", None), choice.stop_reason, params.include_stop_str_in_output
        )
        more = turn.more if turn.continued is not None else prompt
        is_stopped = isinstance(choice.stop_reason, str)
        keep(
            turn, more, detokenizer.output_token_ids, text, choice.finish_reason, is_stopped, params.all_stop_token_ids
        )


def whole_text(text: str | None, stop_reason: Any, is_told: bool) -> str | None:
    """Return the text of an answer's ids.

    They have the stop string, of which most clients are not told. Some add it again, such as smolagents: their answer
    is the whole one. Where it is left out, no end of a turn belongs behind these ids.
    """
    return text + stop_reason if text is not None and isinstance(stop_reason, str) and not is_told else text


def keep(
    turn: Turn,
    more: Iterable[int],
    response: Iterable[int],
    text: str | None,
    finish_reason: str | None,
    is_stopped: bool,
    ends: set[int],
) -> None:
    """Keep a call that may be continued.

    Args:
        more: the ids that its prompt adds to those of the call that it continues.
        response, text: its answer.
        is_stopped: whether a stop string has ended it.
        ends: the ids that end one.
    """
    ids = array("i", response)
    # An answer that goes on behind the end of a turn (`ignore_eos`) has turns in it that no message has.
    if finish_reason in ("stop", "length") and text is not None and ends.isdisjoint(ids[:-1]):
        ended = bool(ids) and ids[-1] in ends
        call = Call(
            turn.position,
            turn.rendered,
            array("i", more),
            ids,
            ends,
            ended,
            Said(text, *turn.parsed_as),
            turn.continued,
            is_open=is_stopped and not ended,
            kind=turn.kind,
        )
        kept.calls().add(turn.key, turn.fingerprint, call)
