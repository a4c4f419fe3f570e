"""Parsing of answers, by the parsers that vLLM parses them with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from agentlightning import continuation
from agentlightning.continuation import Answer
from agentlightning.instrumentation.vllm._isolation import contained

__all__ = ["Parsers", "Said", "parsers_of", "possible_tool_choices"]


@dataclass(slots=True)
class Said:
    """The text of an answer, and the options of its request that decide how it is parsed.

    Attributes:
        tool_choices: the one of its request; several where that is not known, since another server has answered it.
        one_call: whether at most one tool call was to be told.
    """

    text: str
    tool_choices: Sequence[Any]
    one_call: bool

    @property
    def nbytes(self) -> int:
        """The memory that it takes, with what the two parsers make of it once it is looked for."""
        # The size of a Python text depends on its widest character.
        return 3 * self.text.__sizeof__()


@dataclass(frozen=True, slots=True)
class Parsers:
    """The parsers of a request's answers.

    Attributes:
        whole: vLLM's class for all of an answer; earlier releases have two that know nothing of each other.
        tools, reasoning: these two.
        auto_tools: whether the server looks for tool calls that no request has forced.
    """

    whole: Any
    tools: Any
    reasoning: Any
    auto_tools: bool
    tokenizer: Any
    model_config: Any
    options: Mapping[str, Any]

    @property
    def look_at_prompts(self) -> bool:
        """Tell whether a parser looks for the end of reasoning in prompts."""
        return self.whole is not None or self.reasoning is not None

    def is_reasoning_end(self, request: Any, ids: Sequence[int]) -> bool:
        """Tell whether the parser takes reasoning to be over after a prompt."""
        parser = self._parser(request) if self.whole is not None else self._reasoning_parser()
        return parser.is_reasoning_end(ids)

    def answers(self, request: Any, said: Said, prompt: Sequence[int], response: Sequence[int]) -> list[Answer]:
        """Return what a client may have been told: a stream may differ from a plain answer."""
        if not (self.whole or self.tools or self.reasoning):
            return [Answer(said.text)]
        # The parsers read the tools, which are the same, and these options.
        requests = [request.model_copy(update={"tool_choice": each}) for each in said.tool_choices]
        ways = (self._plain, self._streamed) if self.whole is not None else (self._separately,)
        found: list[Answer] = []
        for asked, parse in product(requests, ways):
            answer = None
            if len(requests) == 1:
                answer = contained("parsing an answer", parse, asked, said.text, prompt, response)
            else:
                # A parser may refuse an answer to a request of another kind.
                with suppress(Exception):
                    answer = parse(asked, said.text, prompt, response)
            if answer is not None and answer not in found:
                found.append(answer)
                if said.one_call:
                    found.append(replace(answer, tool_calls=answer.tool_calls[:1]))
        return found

    def _parser(self, request: Any) -> Any:
        return self.whole(
            self.tokenizer, request.tools, model_config=self.model_config, chat_template_kwargs=self.options
        )

    def _reasoning_parser(self) -> Any:
        return self.reasoning(self.tokenizer, chat_template_kwargs=self.options)

    def _plain(self, request: Any, text: str, prompt: Sequence[int], response: Sequence[int]) -> Answer:
        parser = self._parser(request)
        # From 0.26 on, some parsers look at the prompt.
        if hasattr(parser, "set_prompt_token_ids"):
            parser.set_prompt_token_ids(prompt)
        reasoning, content, tool_calls = parser.parse(
            text, request, enable_auto_tools=self.auto_tools, model_output_token_ids=response
        )
        return _answer(reasoning, content, [(each.name, each.arguments) for each in tool_calls or ()])

    def _streamed(self, request: Any, text: str, prompt: Sequence[int], response: Sequence[int]) -> Answer:
        """Return what a stream says in the end."""
        delta = self._parser(request).parse_delta(text, response, request, prompt_token_ids=prompt, finished=True)
        if delta is None:
            return Answer("")
        parts: dict[int, list[str]] = {}
        for each in delta.tool_calls or ():
            name, arguments = getattr(each.function, "name", None), getattr(each.function, "arguments", None)
            part = parts.setdefault(each.index, ["", ""])
            part[0] += name or ""
            part[1] += arguments or ""
        return _answer(delta.reasoning, delta.content, parts.values())

    def _separately(self, request: Any, text: str, prompt: Sequence[int], response: Sequence[int]) -> Answer:
        reasoning, content = None, text
        if self.reasoning is not None:
            reasoning, content = self._reasoning_parser().extract_reasoning(text, request=request)
        if self.tools is not None and self.auto_tools and request.tool_choice in ("auto", None):
            takes_tools = "tools" in inspect.signature(self.tools.__init__).parameters
            parser = self.tools(self.tokenizer, request.tools) if takes_tools else self.tools(self.tokenizer)
            found = parser.extract_tool_calls(content or "", request=request)
            if found is not None and found.tools_called:
                functions = [each.function for each in found.tool_calls]
                return _answer(reasoning, found.content, [(each.name, each.arguments) for each in functions])
        return _answer(reasoning, content, ())


def _answer(reasoning: str | None, content: str | None, calls: Any) -> Answer:
    functions = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return Answer(content or "", continuation.canonical_calls(functions), reasoning or "")


def parsers_of(
    preparing: Any, arguments: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any] | None
) -> Parsers:
    """Return the parsers of a request's answers.

    Args:
        preparing: what prepares chats in this release, which has some of them.
        arguments: those of its method, which are others.
        options: the arguments of the chat template.
    """
    whole = arguments.get("parser") or getattr(preparing, "parser", None)
    tools, reasoning = arguments.get("tool_parser"), arguments.get("reasoning_parser")
    if not hasattr(whole, "parse_delta"):
        # Of 0.16 to 0.23, where the one for Responses only holds the two others.
        reasoning = reasoning or getattr(whole, "reasoning_parser_cls", None)
        for name in ("reasoning_parser_cls", "reasoning_parser"):
            found = getattr(preparing, name, None)
            reasoning = reasoning or (found if isinstance(found, type) else None)
        whole = None
    return Parsers(
        whole,
        tools,
        reasoning,
        getattr(preparing, "enable_auto_tools", False),
        tokenizer,
        preparing.model_config,
        options or {},
    )


def possible_tool_choices(request: Any) -> Sequence[Any]:
    """Return the tool choices that an earlier request of this conversation may have had, as far as one can try them."""
    own = getattr(request, "tool_choice", None)
    others = ("auto", "none") if getattr(request, "tools", None) else ()
    return [own, *(each for each in others if each != own)]
