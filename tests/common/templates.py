"""Chat templates in the style of four families of models, and how transformers renders them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of Qwen 2.5 and many others: what was said stays as it is."""

LLAMA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_start|>\n\n"
    "{% if message['tool_calls'] %}"
    '{"name": "{{ message.tool_calls[0].function.name }}", '
    '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ message['content'] | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
"""The template of Llama 3: a text loses the white space at its ends, and a turn ends without a line feed."""

MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% if message['tool_calls'] %}<tool_call>{{ message.tool_calls[0].function | tojson }}"
    "{% else %} {{ message['content'] }}{% endif %}<|im_end|>"
    "{% elif message['role'] == 'tool' %}</tool_call>{{ message['content'] }}<|im_start|>"
    "{% else %}<|im_start|> {{ message['content'] }}<|im_start|>{% endif %}"
    "{% endfor %}"
)
"""The template of Mistral: only answers end with the token that ends a turn, and nothing asks for one."""

QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or message['reasoning_content']) %}"
    "<think>\n{{ (message['reasoning_content'] or '').strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The template of Qwen 3: reasoning stays while tools are called, and goes with the next message of the user."""

TOOLS_LAST = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>tools\n<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""One that is not append-only: its last turn moves on."""

TEMPLATES = {"ChatML": CHATML, "Llama 3": LLAMA, "Mistral": MISTRAL, "Qwen 3": QWEN3}


def rendered(template: str, messages: Sequence[Any], *, answers: bool = True, **options: Any) -> str:
    """Return what transformers makes of the messages.

    Args:
        answers: whether the model is to answer.
        options: of the template.
    """
    options |= {"add_generation_prompt": answers}
    return _compiled(template).render(messages=messages, **options)


@functools.cache
def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # type: ignore[attr-defined]

    return _compile_jinja_template(template)
