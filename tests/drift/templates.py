"""Chat templates with their tokenizers, in the manner of models that many train, to render conversations with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentlightning.sender import Vocabulary
from agentlightning.token_text import TokenTexts
from tests.common.tiny_model import CHAT_TEMPLATE, LLAMA_TOKENS, tiny_model

__all__ = ["CHATML", "LLAMA", "REASONING", "TEMPLATES", "TINY", "TOOLS_FIRST", "Mistral", "Template"]

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

# As Qwen's: tools in the system message, results of tools as the user's, reasoning only after the last question.
CHATML = """\
{% set ns = namespace(last=0) %}\
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% set first = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}\
<|im_start|>system
{{ first }}{% if tools %}{{ '\\n\\n' }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' }}</tools>

For each function call, return a json object within <tool_call></tool_call> XML tags.{% endif %}<|im_end|>
{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning and loop.index0 > ns.last %}<think>
{{ m.reasoning.strip() }}
</think>

{% endif %}{{ m.content or '' }}\
{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}\
{% set of = call.function or call %}<tool_call>
{"name": "{{ of.name }}", "arguments": {{ of.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}<|im_start|>assistant{{ '\\n' }}"""
LLAMA = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

{% if tools %}Environment: ipython
{% endif %}Cutting Knowledge Date: December 2023
Today Date: {{ date or '26 Jul 2024' }}

{{ messages[0].content.strip() if messages[0].role == 'system' else '' }}<|eot_id|>\
{% for m in messages %}{% if m.role == 'user' %}<|start_header_id|>user<|end_header_id|>

{% if tools and loop.index0 == 1 %}Given the following functions, please respond with a JSON for a function call.

{% for tool in tools %}{{ tool | tojson(4) }}

{% endfor %}{% endif %}{{ m.content.strip() }}<|eot_id|>{% elif m.role == 'tool' %}\
<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>{% elif m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>

{% if m.tool_calls %}{% set of = m.tool_calls[0].function or m.tool_calls[0] %}\
{"name": "{{ of.name }}", "parameters": {{ of.arguments | tojson }}}\
{% else %}{{ m.content.strip() }}{% endif %}<|eot_id|>{% endif %}{% endfor %}\
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"""


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class Template:
    """A template over the tokenizer of the tiny model, to which special tokens of the template are added.

    Attributes:
        stop: the token that ends an answer.
    """

    def __init__(
        self, name: str, text: str, stop: str = "<|im_end|>", tokens: Sequence[str] = (), *, thinks: bool = False
    ) -> None:
        self.name, self.stop, self.thinks = name, stop, thinks
        self.other_stop = "<|endoftext|>"
        # As transformers does.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        self._template = environment.from_string(text)
        self._tokens = tokens

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import AddedToken, Tokenizer

        tokenizer = Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in self._tokens])
        return tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        tokens: list[str | None] = [None] * (max(self._ids.values()) + 1)
        for token, number in self._ids.items():
            tokens[number] = token
        special = {self._ids[each] for each in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *self._tokens)}
        return Vocabulary(tokens, frozenset(special))

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def id_of(self, token: str) -> int:
        return self._ids[token]

    def prompt(self, messages: Sequence[Message], tools: Tools = (), **more: Any) -> list[int]:
        """Render messages, and the beginning of an answer."""
        return self.encode(self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **more))

    def said(self, message: Message) -> str:
        """Return how a model writes a message, exactly as the template does."""
        calls = [_tojson({"name": each["name"], "arguments": each["arguments"]}) for each in message["tool_calls"]]
        if self.stop == "<|eot_id|>" and calls:
            return calls[0].replace('"arguments"', '"parameters"')
        thoughts = f"<think>\n{message['reasoning']}\n</think>\n\n" if message.get("reasoning") else ""
        written = "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls)
        content = message["content"]
        return thoughts + (f"{content}\n{written}" if content and written else content or written)

    def answer(self, message: Message) -> list[int]:
        """Return the ids that a model samples for a message."""
        return [*self.encode(self.said(message)), self.id_of(self.stop)]

    def retokenised(self, token_ids: Sequence[int], draw: Any) -> list[int]:
        """Return other ids for the same text: one token as its bytes."""
        long = [at for at, each in enumerate(token_ids) if self._is_splittable(each)]
        if not long:
            return list(token_ids)
        at = draw.choice(long)
        token = self._piece(token_ids[at])
        return [*token_ids[:at], *(self.id_of(each) for each in token), *token_ids[at + 1 :]]

    def _is_splittable(self, token_id: int) -> bool:
        token = self._piece(token_id)
        known = self._ids
        return len(token) > 1 and token_id not in self.texts.special and "<" not in token and known.keys() >= {*token}

    def _piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()


class Mistral(Template):
    """A tokenizer and its template of `mistral-common`, which vLLM installs."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "", "</s>")
        self.other_stop = "<s>"

    @cached_property
    def _tokenizer(self) -> Any:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        return MistralTokenizer.v7() if self.name == "mistral" else MistralTokenizer.v3(is_tekken=True)

    @cached_property
    def _tekken(self) -> Any:
        return self._tokenizer.instruct_tokenizer.tokenizer

    def _piece(self, token_id: int) -> str:
        return self._tekken.id_to_piece(token_id)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {self._tekken.id_to_piece(each): each for each in range(self._tekken.n_words - 1, -1, -1)}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary as vLLM has it: of equal pieces, which are parts of characters, it keeps one."""
        tekken = self._tekken
        tokens: list[str | None] = [None] * tekken.n_words
        for token, number in self._ids.items():
            tokens[number] = token
        return Vocabulary(tokens, frozenset(each for each in range(tekken.n_words) if tekken.is_special(each)))

    def encode(self, text: str) -> list[int]:
        return self._tekken.encode(text, bos=False, eos=False)

    def prompt(self, messages: Sequence[Message], tools: Tools = (), **more: Any) -> list[int]:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        written = [_for_mistral(each, number) for number, each in enumerate(messages)]
        request: Any = {"messages": written, "tools": [{"type": "function", **each} for each in tools] or None}
        return self._tokenizer.encode_chat_completion(ChatCompletionRequest(**request)).tokens

    def answer(self, message: Message) -> list[int]:
        stop = self.id_of(self.stop)
        if not message["tool_calls"]:
            return [*self.encode(message["content"]), stop]
        calls = [
            {"name": each["name"], "arguments": each["arguments"], "id": "abcdefghi"} for each in message["tool_calls"]
        ]
        return [self.id_of("[TOOL_CALLS]"), *self.encode(_tojson(calls)), stop]


def _for_mistral(message: Message, number: int) -> Message:
    found: Message = {"role": message["role"], "content": message["content"]}
    if message["role"] == "assistant" and message["tool_calls"]:
        calls = [
            {"id": "abcdefghi", "function": {"name": each["name"], "arguments": _tojson(each["arguments"])}}
            for each in message["tool_calls"]
        ]
        found |= {"content": None, "tool_calls": calls}
    if message["role"] == "tool":
        found["tool_call_id"] = "abcdefghi"
    return found


TINY = Template("tiny", CHAT_TEMPLATE.replace("call.function", "call"))
_TOOLS = CHAT_TEMPLATE[CHAT_TEMPLATE.index("{% if tools %}") : CHAT_TEMPLATE.index("{% if add_generation_prompt %}")]
TOOLS_FIRST = Template("tiny, tools first", _TOOLS + CHAT_TEMPLATE.replace(_TOOLS, "").replace("call.function", "call"))
REASONING = Template("chatml with reasoning", CHATML, thinks=True)
TEMPLATES = (
    Template("chatml", CHATML),
    REASONING,
    Template("llama 3", LLAMA, "<|eot_id|>", LLAMA_TOKENS),
    Mistral("mistral"),
)


@cache
def named(name: str) -> Template:
    """Return the template of this name."""
    return next(each for each in (*TEMPLATES, TINY) if each.name == name)
