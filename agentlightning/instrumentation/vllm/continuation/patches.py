"""Patches of how vLLM prepares a chat: between rendering its messages and tokenising the text, exact ids take over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from agentlightning import continuation
from agentlightning.continuation import NotText
from agentlightning.instrumentation.vllm import _context, _releases
from agentlightning.instrumentation.vllm._carriers import is_probe
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained, contained_async
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.continuation import kept, recall
from agentlightning.instrumentation.vllm.continuation.chats import (
    ROUTES,
    Chat,
    OlderChat,
    RenderedChat,
    RenderedText,
    capturing,
)
from agentlightning.instrumentation.vllm.continuation.prompts import Conversation, Exact, Turn, is_plain
from agentlightning.patching import NotForThisRelease, Patch, Where, Wrap

__all__ = ["CHAT_PATCHES", "RENDERING_PATCHES"]


@dataclass(slots=True)
class _Preparing:
    """A chat request while vLLM prepares its prompt.

    Attributes:
        by: vLLM's object that prepares it; it has the parsers.
        arguments: those of its method, by name.
        method: that method, as it is without us.
        chat_params: how vLLM renders the messages, once it does.
        key: whose calls the request may continue.
        context: the HTTP request.
    """

    by: Any
    arguments: Mapping[str, Any]
    method: Callable[..., Any]
    key: Hashable
    context: RequestContext
    chat_params: Any = None
    turn: Turn | None = None
    goes_on: bool = False

    @property
    def is_counted(self) -> bool:
        """Tell whether the prompt stays vLLM's own, whatever comes of it."""
        return session.settings.continues != "on"

    async def ids(self, chat_of: Callable[[], Chat]) -> list[int] | None:
        """Return the ids that take the place of a prompt's text; None for vLLM's own prompt."""
        exact: Exact | str
        try:
            exact = await self._decide(chat_of())
        except NotText:
            exact = continuation.NOT_TEXT
        if isinstance(exact, str):
            kept.count(exact)
            return None
        assert self.turn is not None
        # Those that are only counted are kept as if they had gone on: the next call would go on from them.
        self.turn.continued, self.turn.more, self.turn.rendered = exact.call, exact.more, exact.rendered
        is_last = exact.call.position == continuation.last_answer(self.arguments["messages"])
        kept.count(continuation.CONTINUED if is_last else continuation.CONTINUED_EARLIER)
        self.goes_on = not self.is_counted
        return exact.ids() if self.goes_on else None

    async def _decide(self, chat: Chat) -> Exact | str:
        if not is_plain(chat):
            return continuation.OTHER_REQUEST
        conversation = Conversation.of(chat, self.key)
        self.turn = conversation.turn()
        last = continuation.last_answer(chat.messages)
        if last is None:
            return continuation.FIRST_CALL
        match = conversation.match()
        is_available = True
        if (match is None or match.call.position < last) and self._may_recall():
            is_available = await recall.recall(conversation, match, self.context)
            match = conversation.match()
        if match is None and conversation.is_of_other_kind(last):
            return continuation.OTHER_OPTIONS
        if match is None and kept.calls().knows(self.key):
            return continuation.NO_MATCH
        if match is None:
            return continuation.ELSEWHERE if is_available else continuation.STORE_NOT_AVAILABLE
        return await conversation.go_on(match)

    def _may_recall(self) -> bool:
        # A request whose prompt stays as it is does not wait.
        return session.is_recording and not self.is_counted


_preparing: ContextVar[_Preparing | None] = ContextVar("agentlightning.preparing", default=None)


def wrap_preprocess_chat(preprocess_chat: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the method that all three interfaces hand their messages to."""
    signature = inspect.signature(preprocess_chat)

    async def preprocess_chat_of_rollout(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = _context.current()
        # Off in a process that was forked with other variables than the one that had imported vLLM.
        on = context is not None and session.settings.continues != "off" and not capturing.get()
        preparing = (
            contained("reading a chat request", _read, preprocess_chat, signature, context, self, *args, **kwargs)
            if on
            else None
        )
        if preparing is None:
            return await preprocess_chat(self, *args, **kwargs)
        token = _preparing.set(preparing)
        try:
            answer = await preprocess_chat(self, *args, **kwargs)
            contained("reading a prompt", _note_prompt, preparing, answer)
            return answer
        finally:
            _preparing.reset(token)

    return preprocess_chat_of_rollout


def _read(
    method: Callable[..., Any],
    signature: inspect.Signature,
    context: RequestContext,
    by: Any,
    *args: Any,
    **kwargs: Any,
) -> _Preparing | None:
    key = _key(context)
    if key is None or context.endpoint not in ROUTES or is_probe(context):
        return None
    bound = signature.bind(by, *args, **kwargs)
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
    messages = arguments["messages"]
    if not all(isinstance(message, dict) for message in messages):
        return None
    for message in messages:
        # Pydantic's iterators can be read once only, and are read again here.
        for name in ("content", "tool_calls"):
            if not isinstance(message.get(name), str | list | None):
                message[name] = [*message[name]]
    return _Preparing(by, arguments, method, key, context)


def _key(context: RequestContext) -> Hashable | None:
    """Return whose calls a request may continue: its agent's, of its rollout and attempt, or else of its session."""
    if context.rollout_id is not None:
        return "rollout", context.rollout_id, context.attempt_id, context.calling_agent_id
    return None if context.session_id is None else ("session", context.session_id, context.calling_agent_id)


def _note_prompt(preparing: _Preparing, answer: Any) -> None:
    _, [prompt] = answer
    if preparing.goes_on:
        # Releases up to 0.15 put the template's text beside the ids, which are not those of it.
        prompt.pop("prompt", None)
    turn = preparing.turn
    if turn is not None and (ids := prompt.get("prompt_token_ids")):
        turn.prompt_token_ids = ids
        # Kept by the context, which is the same object in every task that serves the request.
        preparing.context.turns.append(turn)


def wrap_render_chat(render_chat: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BaseRenderer.render_chat_async`, which has the parameters of the rendering."""

    async def render_chat_and_note(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        preparing = _preparing.get()
        if preparing is not None and len(conversations) == 1:
            preparing.chat_params = chat_params
        return await render_chat(self, conversations, chat_params, tok_params, *args, **kwargs)

    return render_chat_and_note


def wrap_tokenize(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `BaseRenderer.tokenize_prompts_async`, which takes what was rendered: text, or ids."""

    async def tokenize_or_continue(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        preparing = _preparing.get()
        if preparing is None or preparing.chat_params is None or len(prompts) != 1:
            return await tokenize(self, prompts, params, *args, **kwargs)

        rendered: Mapping[str, Any] = {**prompts[0]}
        own_ids: list[int] | None = None

        def chat() -> Chat:
            by, arguments = preparing.by, preparing.arguments
            return RenderedChat(by, arguments, self, rendered, preparing.chat_params, params, tokenize, own_ids)

        if preparing.is_counted:
            answer = await tokenize(self, prompts, params, *args, **kwargs)
            own_ids = answer[0].get("prompt_token_ids")
            await contained_async("counting a prompt", preparing.ids, chat)
            return answer
        ids = await contained_async("continuing a call", preparing.ids, chat)
        return await tokenize(self, prompts if ids is None else [{"prompt_token_ids": ids}], params, *args, **kwargs)

    return tokenize_or_continue


def wrap_tokenize_prompt(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OpenAIServing._tokenize_prompt_input_async`, which takes the text of a chat, or ids."""

    async def tokenize_or_continue(
        self: Any, request: Any, tokenizer: Any, prompt_input: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if capturing.get():
            raise RenderedText(prompt_input)
        preparing = _preparing.get()
        if preparing is None or not isinstance(prompt_input, str):
            return await tokenize(self, request, tokenizer, prompt_input, *args, **kwargs)

        async def tokenize_text(text: str) -> Any:
            return await tokenize(self, request, tokenizer, text, *args, **kwargs)

        own_ids: list[int] | None = None

        def chat() -> OlderChat:
            by, arguments = preparing.method, preparing.arguments
            return OlderChat(self, arguments, by, prompt_input, tokenizer, tokenize_text, own_ids)

        if preparing.is_counted:
            answer = await tokenize(self, request, tokenizer, prompt_input, *args, **kwargs)
            own_ids = answer["prompt_token_ids"]
            await contained_async("counting a prompt", preparing.ids, chat)
            return answer
        ids = await contained_async("continuing a call", preparing.ids, chat)
        return await tokenize(self, request, tokenizer, prompt_input if ids is None else ids, *args, **kwargs)

    return tokenize_or_continue


def _is_on(module: ModuleType) -> bool:
    if _releases.is_older_than(_releases.CONTINUES_SINCE):
        raise NotForThisRelease(f"came with vLLM {_releases.CONTINUES_SINCE}")
    return session.settings.continues != "off"


def _where(condition: Callable[[ModuleType], bool], target: str, *parameters: str, wrapper: Any) -> Patch:
    return Where(lambda module: _is_on(module) and condition(module), Wrap(target, parameters, wrapper))


def _serves(module: ModuleType) -> bool:
    return hasattr(module, "OpenAIServing")


def _serves_older(module: ModuleType) -> bool:
    return _serves(module) and _releases.is_older_than(_releases.RENDERS_CHATS_SINCE)


def _renders(module: ModuleType) -> bool:
    return hasattr(module, "OpenAIServingRender")


def _renders_within(module: ModuleType) -> bool:
    return hasattr(getattr(module, "OpenAIServingRender", None), "_preprocess_chat")


def _prepares(condition: Callable[[ModuleType], bool], target: str) -> Patch:
    return _where(condition, target, "request", "messages", wrapper=wrap_preprocess_chat)


CHAT_PATCHES: tuple[Patch, ...] = (
    _prepares(lambda module: not _renders(module) and not _serves(module), "OnlineRenderer.preprocess_chat"),
    # From 0.18 to 0.24; in 0.18 by another name.
    _prepares(lambda module: _renders(module) and not _renders_within(module), "OpenAIServingRender.preprocess_chat"),
    _prepares(_renders_within, "OpenAIServingRender._preprocess_chat"),
    # To 0.17.
    _prepares(_serves, "OpenAIServing._preprocess_chat"),
    _where(
        _serves_older,
        "OpenAIServing._tokenize_prompt_input_async",
        *("request", "tokenizer", "prompt_input"),
        wrapper=wrap_tokenize_prompt,
    ),
)


def _has_renderer(module: ModuleType) -> bool:
    if _releases.is_older_than(_releases.RENDERS_CHATS_SINCE):
        raise NotForThisRelease(f"came with vLLM {_releases.RENDERS_CHATS_SINCE}")
    return True


RENDERING_PATCHES: tuple[Patch, ...] = (
    _where(
        _has_renderer,
        "BaseRenderer.render_chat_async",
        *("conversations", "chat_params", "tok_params"),
        wrapper=wrap_render_chat,
    ),
    _where(_has_renderer, "BaseRenderer.tokenize_prompts_async", "prompts", "params", wrapper=wrap_tokenize),
)
