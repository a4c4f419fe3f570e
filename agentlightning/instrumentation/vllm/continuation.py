"""Chat prompts that go on from the exact ids of earlier calls (`AGL_CONTINUE`), where vLLM renders and tokenises them.

vLLM turns the requests of all three chat interfaces into messages, renders these (`render_chat_async`) and tokenises
the text (`tokenize_prompts_async`). In between, the text is known and no id: the call that it continues is looked up,
the template is proved to append only, and ids take the place of the text. All that comes before and after is vLLM's.
When the engine has answered, the call is kept for the next one, in this process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from agentlightning import continuation
from agentlightning.continuation import Answer, Call, Histories, Match, NotText, Rendered
from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._carriers import is_probe
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained, contained_async
from agentlightning.instrumentation.vllm.capture.conversion import CapturedRequest
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["PATCHES", "PATCH_SET", "ROUTES", "forget", "note_finished", "report", "start"]

PATCH_SET = "continuation"
ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/responses")

_results: Counter[str] = Counter()
_histories: Histories | None = None
_metric: Any = None


def start() -> None:
    """Show the metric from the start: Prometheus sees no increase in a counter that appears with its first event."""
    global _metric
    if session.settings.continues == "off" or _metric is not None:
        return
    # vLLM's own. Not imported at the top: it decides on import whether there are several processes.
    from prometheus_client import Counter

    _metric = Counter("agentlightning_continuations", "Chat prompts, by whether they went on from ids.", ["result"])
    for result in continuation.RESULTS:
        _metric.labels(result)


def report() -> dict[str, Any] | None:
    """Return the counts for the status; None if nothing is continued."""
    if session.settings.continues == "off":
        return None
    kept = _kept()
    results = {result: _results[result] for result in continuation.RESULTS}
    return {"results": results, "calls": len(kept), "bytes": kept.nbytes, "dropped": kept.dropped}


def forget() -> None:
    """Forget all calls: the patches that use them are being removed."""
    global _histories
    _histories = None


def _kept() -> Histories:
    global _histories
    if _histories is None:
        _histories = Histories(session.settings.continue_bytes)
    return _histories


def _count(result: str) -> None:
    _results[result] += 1
    if _metric is not None:
        _metric.labels(result).inc()


@dataclass(slots=True)
class _Said:
    """The text of an answer, and the options of its request that decide how it is parsed."""

    text: str
    tool_choice: Any
    one_call: bool

    @property
    def nbytes(self) -> int:
        # With what the two parsers make of it, plain and streamed, once it is looked for.
        return 3 * sys.getsizeof(self.text)


@dataclass(slots=True)
class _Turn:
    """A chat prompt that the engine was given, until it has answered.

    Attributes:
        key: whose it is.
        position: the number of its messages.
        fingerprint: that of all of them.
        tool_choice, one_call: options of its request, for its answer's parser.
        rendered: the template's text.
        continued: the call that it continues, or would, and the ids that its exact prompt adds to that call's.
        prompt_token_ids: vLLM's own list.
    """

    key: Hashable
    position: int
    fingerprint: bytes
    tool_choice: Any
    one_call: bool
    rendered: Rendered
    continued: Call | None = None
    more: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()


@dataclass(slots=True)
class _Rendering:
    """A chat request, while vLLM renders and tokenises it.

    Attributes:
        online: vLLM's `OnlineRenderer`, which has the parsers.
        chat_params: how vLLM renders the messages.
    """

    online: Any
    request: Any
    messages: list[Any]
    key: Hashable
    chat_params: Any = None
    turn: _Turn | None = None

    async def continue_prompt(self, renderer: Any, prompt: Mapping[str, Any], params: Any, tokenize: Any) -> Any:
        """Return a prompt of ids to take the place of this one; None if vLLM's own is used."""
        ids = None
        try:
            result = await self._decide(renderer, prompt, params, tokenize)
            if not isinstance(result, str):
                result, ids = continuation.CONTINUED, result
        except NotText:
            result = continuation.NOT_TEXT
        _count(result)
        return ids

    async def _decide(
        self, renderer: Any, prompt: Mapping[str, Any], params: Any, tokenize: Any
    ) -> str | dict[str, Any]:
        whole = _as_text(prompt)
        if not _is_plain(self.request, self.chat_params, params):
            return continuation.OTHER_REQUEST
        messages = self.messages
        fingerprints = continuation.fingerprints(messages, _kind(self.request, self.chat_params))
        turn = self.turn = _Turn(
            self.key,
            len(messages),
            fingerprints[-1],
            getattr(self.request, "tool_choice", None),
            getattr(self.request, "parallel_tool_calls", None) is False,
            Rendered.of(whole),
        )
        match = _kept().find(
            self.key, messages, fingerprints, lambda call: [*self._parse(renderer.get_tokenizer(), call)]
        )
        if match is None:
            if not continuation.has_answer(messages):
                return continuation.FIRST_CALL
            return continuation.NO_MATCH if _kept().knows(self.key) else continuation.ELSEWHERE
        return await self._go_on(turn, match, prompt, renderer, params, tokenize)

    async def _go_on(
        self, turn: _Turn, match: Match, own: Mapping[str, Any], renderer: Any, params: Any, tokenize: Any
    ) -> str | dict[str, Any]:
        whole, as_ids = _as_text(own), "prompt_token_ids" in own
        call, place, rendered = match.call, match.call.position, turn.rendered
        messages = continuation.with_reasoning(self.messages, call.reasoning(match.answer))
        before = [*messages[: place + 1], continuation.stand_in_for(messages[place + 1])]
        try:
            if messages is not self.messages:
                whole = await _render(renderer, messages, self.chat_params)
                rendered = Rendered.of(whole)
            stand_in = await _render(renderer, before, _without_generation_prompt(self.chat_params))
        except Exception:
            # The template takes what the client has sent, and not this: it looks at more than it appends.
            return continuation.NOT_APPEND_ONLY
        tokenizer = renderer.get_tokenizer()
        # A client may stop at any token, and that of a word says nothing about turns.
        tokens = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}.intersection(call.ends)
        ends = {each: chr(each) if as_ids else tokenizer.convert_ids_to_tokens(each) for each in tokens}
        keep = session.settings.continue_reasoning == "keep"
        read: Callable[[str], str] = (lambda part: tokenizer.decode([*map(ord, part)])) if as_ids else str
        seam = continuation.find_seam(whole, stand_in, match, messages[place], ends, keep, read)
        if isinstance(seam, str):
            return seam
        # From the token that ends a turn on, a text is tokenised by itself as it is with what comes before.
        rest = whole[seam.start :]
        if as_ids:
            new = [ord(each) for each in rest]
        else:
            try:
                (prompt,) = await tokenize(renderer, [{"prompt": rest}], replace(params, add_special_tokens=False))
            except Exception:
                # vLLM refuses a text that alone is longer than what the model takes.
                return continuation.TOO_LONG
            new = prompt["prompt_token_ids"]
        if new[:1] != [seam.end_id]:
            return continuation.SEAM
        context = call.token_ids()
        ids = context + (new[1:] if call.ended else new)
        # An answer takes one at least.
        if params.max_input_tokens is not None and len(ids) >= params.max_input_tokens:
            return continuation.TOO_LONG
        if self.online.parser is not None:
            parser = self._parser(tokenizer)
            has_ended = parser.is_reasoning_end(ids)
            # Some parsers look for the end of the answer's reasoning in all of the prompt. Most do not, and vLLM's own
            # prompt, which may be long, is not tokenised for them.
            if has_ended != parser.is_reasoning_end(new):
                (prompt,) = await tokenize(renderer, [own], params)
                if has_ended != parser.is_reasoning_end(prompt["prompt_token_ids"]):
                    return continuation.PARSER
        # Those that are only counted are kept as if they had gone on: the next call would go on from them.
        turn.continued, turn.more, turn.rendered = call, ids[len(context) :], rendered
        return {"prompt_token_ids": ids}

    def _parser(self, tokenizer: Any) -> Any:
        return self.online.parser(
            tokenizer,
            self.request.tools,
            model_config=self.online.model_config,
            chat_template_kwargs=self.chat_params.chat_template_kwargs,
        )

    def _parse(self, tokenizer: Any, call: Call) -> list[Answer]:
        """Return what a client may have been told of a call's answer, by the parsers that vLLM parses it with."""
        said = call.said
        if self.online.parser is None:
            return [Answer(said.text)]
        # The parsers read the tools, which are the same, and these options.
        request = self.request.model_copy(update={"tool_choice": said.tool_choice})
        answers: list[Answer] = []
        for parse in (_parse_plain, _parse_streamed):
            parser = self._parser(tokenizer)
            answer = contained("parsing an answer", parse, parser, request, call, self.online.enable_auto_tools)
            if answer is not None and answer not in answers:
                answers.append(answer)
                if said.one_call:
                    answers.append(replace(answer, tool_calls=answer.tool_calls[:1]))
        return answers


_rendering: ContextVar[_Rendering | None] = ContextVar("agentlightning.rendering", default=None)


def wrap_preprocess_chat(preprocess_chat: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OnlineRenderer.preprocess_chat`, which all three interfaces hand their messages to."""

    async def preprocess_chat_of_rollout(self: Any, request: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        context = _context.current()
        # Off in a process that was forked with other variables than the one that had imported vLLM.
        on = context is not None and session.settings.continues != "off"
        rendering = contained("reading a chat request", _read, self, request, messages, context) if on else None
        if rendering is None:
            return await preprocess_chat(self, request, messages, *args, **kwargs)
        token = _rendering.set(rendering)
        try:
            return await preprocess_chat(self, request, messages, *args, **kwargs)
        finally:
            _rendering.reset(token)
            # Kept by the context, which is the same object in every task that serves the request.
            if context is not None and rendering.turn is not None and rendering.turn.prompt_token_ids:
                context.turns.append(rendering.turn)

    return preprocess_chat_of_rollout


def _read(online: Any, request: Any, messages: Any, context: RequestContext) -> _Rendering | None:
    key = _key(context)
    if key is None or context.endpoint not in ROUTES or is_probe(context):
        return None
    if not all(isinstance(message, dict) for message in messages):
        return None
    for message in messages:
        # Pydantic's iterators can be read once only, and are read again here.
        for name in ("content", "tool_calls"):
            if not isinstance(message.get(name), str | list | None):
                message[name] = [*message[name]]
    return _Rendering(online, request, messages, key)


def _key(context: RequestContext) -> Hashable | None:
    """Return whose calls a request may continue: its agent's, of its rollout and attempt, or else of its session."""
    if context.rollout_id is not None:
        return "rollout", context.rollout_id, context.attempt_id, context.calling_agent_id
    return None if context.session_id is None else ("session", context.session_id, context.calling_agent_id)


def wrap_render_chat(render_chat: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BaseRenderer.render_chat_async`, which has the parameters of the rendering."""

    async def render_chat_and_note(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        rendering = _rendering.get()
        if rendering is not None and len(conversations) == 1:
            rendering.chat_params = chat_params
        return await render_chat(self, conversations, chat_params, tok_params, *args, **kwargs)

    return render_chat_and_note


def wrap_tokenize(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BaseRenderer.tokenize_prompts_async`, which takes what was rendered: text, or ids."""

    async def tokenize_or_continue(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        rendering = _rendering.get()
        if rendering is None or rendering.chat_params is None or len(prompts) != 1:
            return await tokenize(self, prompts, params, *args, **kwargs)
        ids = await contained_async("continuing a call", rendering.continue_prompt, self, prompts[0], params, tokenize)
        if ids is not None and session.settings.continues == "on":
            prompts = [ids]
        answer = await tokenize(self, prompts, params, *args, **kwargs)
        if rendering.turn is not None:
            rendering.turn.prompt_token_ids = answer[0].get("prompt_token_ids", ())
        return answer

    return tokenize_or_continue


def note_finished(captured: CapturedRequest) -> None:
    """Keep a request to the engine, which has answered it, for the call that continues it."""
    prompt = captured.prompt_token_ids
    if captured.context is None or not prompt:
        return
    turn = next((turn for turn in captured.context.turns if turn.prompt_token_ids in (prompt,)), None)
    if turn is None:
        return
    params = captured.sampling_params
    ends: set[int] = params.all_stop_token_ids
    more = array("i", turn.more if turn.continued is not None else prompt)
    for choice in captured.finished:
        if choice.finish_reason in ("stop", "length"):
            detokenizer = choice.state.detokenizer
            response = array("i", detokenizer.output_token_ids)
            text = getattr(detokenizer, "output_text", None)
            # An answer that goes on behind the end of a turn (`ignore_eos`) has turns in it that no message has.
            if text is not None and ends.isdisjoint(response[:-1]):
                # The ids have a stop string that the client was not told of: no end of a turn belongs behind them.
                untold = isinstance(choice.stop_reason, str) and not params.include_stop_str_in_output
                call = Call(
                    turn.position,
                    turn.rendered,
                    more,
                    response,
                    () if untold else ends,
                    bool(response) and response[-1] in ends,
                    _Said(text, turn.tool_choice, turn.one_call),
                    turn.continued,
                )
                _kept().add(turn.key, turn.fingerprint, call)


def _parse_plain(parser: Any, request: Any, call: Call, auto_tools: bool) -> Answer:
    """Return what a plain answer says."""
    parser.set_prompt_token_ids(call.prompt())
    reasoning, content, tool_calls = parser.parse(
        call.said.text, request, enable_auto_tools=auto_tools, model_output_token_ids=call.response_token_ids.tolist()
    )
    calls = [{"function": {"name": each.name, "arguments": each.arguments}} for each in tool_calls or ()]
    return Answer(content or "", continuation.canonical_calls(calls), reasoning or "")


def _parse_streamed(parser: Any, request: Any, call: Call, auto_tools: bool) -> Answer:
    """Return what a stream says in the end."""
    delta = parser.parse_delta(
        call.said.text,
        call.response_token_ids.tolist(),
        request,
        prompt_token_ids=call.prompt(),
        finished=True,
    )
    if delta is None:
        return Answer("")
    parts: dict[int, list[str]] = {}
    for each in delta.tool_calls or ():
        name, arguments = getattr(each.function, "name", None), getattr(each.function, "arguments", None)
        part = parts.setdefault(each.index, ["", ""])
        part[0] += name or ""
        part[1] += arguments or ""
    calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in parts.values()]
    return Answer(delta.content or "", continuation.canonical_calls(calls), delta.reasoning or "")


def _is_plain(request: Any, chat_params: Any, params: Any) -> bool:
    """Tell whether a request's prompt may be another one than vLLM's: no option of it refers to its text."""
    options = chat_params.chat_template_kwargs
    return (
        params.truncate_prompt_tokens is None
        and not getattr(params, "return_token_offsets", False)
        and options.get("add_generation_prompt", True)
        and not options.get("continue_final_message", False)
        and not getattr(request, "echo", False)
        and not getattr(request, "use_beam_search", False)
        and getattr(request, "prompt_logprobs", None) is None
    )


def _as_text(prompt: Mapping[str, Any]) -> str:
    """Return the text of a rendered prompt; where the template gives ids, a text with a character for each of them.

    Raises:
        NotText: there are images or embeddings beside it.
    """
    (name, value), *others = prompt.items()
    if others or name not in ("prompt", "prompt_token_ids"):
        raise NotText(name)
    return value if isinstance(value, str) else "".join(map(chr, value))


async def _render(renderer: Any, messages: Sequence[Any], chat_params: Any) -> str:
    _, prompt = await renderer.render_messages_async([*messages], chat_params)
    return _as_text(prompt)


def _without_generation_prompt(chat_params: Any) -> Any:
    return replace(
        chat_params, chat_template_kwargs={**chat_params.chat_template_kwargs, "add_generation_prompt": False}
    )


def _kind(request: Any, chat_params: Any) -> bytes:
    """Return a digest of what has to be equal beside the messages: model or adapter, template, its arguments, tools."""
    options = [request.model, chat_params.chat_template, chat_params.chat_template_kwargs]
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=repr).encode()).digest()


def _continues(module: ModuleType) -> bool:
    return session.settings.continues != "off"


PATCHES: tuple[Patch, ...] = (
    Where(_continues, Wrap("OnlineRenderer.preprocess_chat", ("request", "messages"), wrap_preprocess_chat)),
    Where(
        _continues,
        Wrap("BaseRenderer.render_chat_async", ("conversations", "chat_params", "tok_params"), wrap_render_chat),
    ),
    Where(_continues, Wrap("BaseRenderer.tokenize_prompts_async", ("prompts", "params"), wrap_tokenize)),
)
