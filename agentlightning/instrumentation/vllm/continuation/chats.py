"""A chat request while vLLM prepares its prompt: how each release renders its messages, and tokenises a text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

from agentlightning.continuation import NotText
from agentlightning.instrumentation.vllm.continuation.parsing import Parsers, parsers_of

__all__ = ["ROUTES", "Chat", "OlderChat", "RenderedChat", "as_text"]

ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/responses")


class Chat(Protocol):
    """A chat request, whose messages have been rendered and not yet tokenised.

    Attributes:
        options: what a template reads beside the messages: itself, and its arguments.
        own: the text of vLLM's own prompt; where the template gives ids, with a character for each.
        as_ids: whether it does.
        own_ids: the ids of `own`, where that is a text and the prompt is only counted; else None.
        limit: the most ids of a prompt; None for no limit.
        tokenizer: vLLM's.
        parsers: those of its answer.
    """

    request: Any
    messages: Sequence[Any]
    options: tuple[Any, Mapping[str, Any]]
    own: str
    as_ids: bool
    own_ids: list[int] | None
    limit: int | None
    tokenizer: Any
    parsers: Parsers

    def is_truncated(self) -> bool:
        """Tell whether the request has its prompt cut, or wants to know more of its text."""
        ...

    async def render(self, messages: Sequence[Any], *, answers: bool = True) -> str:
        """Return the text of these messages, as `own` is that of the request's.

        Args:
            answers: whether the model is to answer.
        """
        ...

    async def tokenise(self, text: str, *, is_whole: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            is_whole: whether it is a prompt, or else a part of one.
        """
        ...


def as_text(prompt: Mapping[str, Any]) -> str:
    """Return the text of a rendered prompt; where the template gives ids, a text with a character for each of them.

    Raises:
        NotText: there are images or embeddings beside it.
    """
    (name, value), *others = prompt.items()
    if others or name not in ("prompt", "prompt_token_ids"):
        raise NotText(name)
    return value if isinstance(value, str) else "".join(map(chr, value))


class RenderedChat:
    """A chat that vLLM's renderers prepare, from 0.16 on.

    Args:
        preparing: what the request's method is of, and the arguments of that.
        chat_params: how messages are rendered.
        params: how a text is tokenised.
        tokenize: vLLM's own method.
        own_ids: as `Chat` has it.
    """

    def __init__(
        self,
        preparing: Any,
        arguments: Mapping[str, Any],
        renderer: Any,
        prompt: Mapping[str, Any],
        chat_params: Any,
        params: Any,
        tokenize: Callable[..., Awaitable[Any]],
        own_ids: list[int] | None,
    ) -> None:
        self.request, self.messages = arguments["request"], arguments["messages"]
        self.options: tuple[Any, Mapping[str, Any]] = chat_params.chat_template, chat_params.chat_template_kwargs
        self.own, self.as_ids = as_text(prompt), "prompt_token_ids" in prompt
        self.own_ids = None if self.as_ids else own_ids
        self.limit = params.max_input_tokens
        self.tokenizer = renderer.get_tokenizer()
        self.parsers = parsers_of(preparing, arguments, self.tokenizer, chat_params.chat_template_kwargs)
        self._renderer, self._chat_params = renderer, chat_params
        self._params, self._tokenize = params, tokenize

    def is_truncated(self) -> bool:
        return self._params.truncate_prompt_tokens is not None or getattr(self._params, "return_token_offsets", False)

    async def render(self, messages: Sequence[Any], *, answers: bool = True) -> str:
        params = self._chat_params
        if not answers:
            options = {**params.chat_template_kwargs, "add_generation_prompt": False}
            params = replace(params, chat_template_kwargs=options)
        _, prompt = await self._renderer.render_messages_async([*messages], params)
        return as_text(prompt)

    async def tokenise(self, text: str, *, is_whole: bool = False) -> list[int]:
        if self.as_ids:
            return [ord(each) for each in text]
        params = self._params if is_whole else replace(self._params, add_special_tokens=False)
        (prompt,) = await self._tokenize(self._renderer, [{"prompt": text}], params)
        return prompt["prompt_token_ids"]


class RenderedText(Exception):
    """Not an error: brings a text back from where vLLM would tokenise it."""


capturing: ContextVar[bool] = ContextVar("agentlightning.capturing", default=False)
"""True while a text that is to be tokenised is wanted in the place of its ids."""


class OlderChat:
    """A chat that vLLM's serving class prepares by itself, in 0.14 and 0.15.

    Args:
        serving: vLLM's.
        arguments: those of its method that prepares a chat.
        prepare: that method.
        text: what it has rendered.
        tokenize: the method that tokenises a text, with the serving class's and the request's arguments.
        own_ids: as `Chat` has it.
    """

    as_ids = False

    def __init__(
        self,
        serving: Any,
        arguments: Mapping[str, Any],
        prepare: Callable[..., Awaitable[Any]],
        text: str,
        tokenizer: Any,
        tokenize: Callable[..., Awaitable[Any]],
        own_ids: list[int] | None,
    ) -> None:
        self.request, self.messages = arguments["request"], arguments["messages"]
        self.own, self.own_ids = text, own_ids
        names = ("add_generation_prompt", "continue_final_message", "tool_dicts", "documents")
        given = {**(arguments.get("default_chat_template_kwargs") or {}), **(arguments["chat_template_kwargs"] or {})}
        options: Mapping[str, Any] = {**{name: arguments[name] for name in names}, **given}
        self.options = arguments["chat_template"], options
        self.limit = serving.max_model_len
        self.tokenizer = tokenizer
        self.parsers = parsers_of(serving, arguments, tokenizer, given)
        self._serving, self._arguments = serving, arguments
        self._prepare, self._tokenize = prepare, tokenize

    def is_truncated(self) -> bool:
        return getattr(self.request, "truncate_prompt_tokens", None) is not None

    async def render(self, messages: Sequence[Any], *, answers: bool = True) -> str:
        # Without a tool parser, which would adjust the request a second time.
        arguments = {
            **self._arguments,
            "messages": [*messages],
            "add_generation_prompt": answers,
            "tool_parser": None,
        }
        token = capturing.set(True)
        try:
            await self._prepare(self._serving, **arguments)
        except RenderedText as rendered:
            return str(rendered)
        finally:
            capturing.reset(token)
        raise NotText("a template of ids")

    async def tokenise(self, text: str, *, is_whole: bool = False) -> list[int]:
        return (await self._tokenize(text))["prompt_token_ids"]
