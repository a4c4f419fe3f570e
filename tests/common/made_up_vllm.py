"""A made-up vLLM: a package of that name with what the instrumentation patches, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

VERSION = "0.99.0"
PROMPT, RESPONSE = [1, 2], [3, 4]

PACKAGE = f'__version__ = "{VERSION}"\n'

CHAT_PROTOCOL = """\
from pydantic import BaseModel, ConfigDict

class ChatCompletionRequest(BaseModel):
    return_token_ids: bool | None = None

class ChatCompletionResponseChoice(BaseModel):
    index: int = 0
    token_ids: list[int] | None = None

class ChatCompletionResponse(BaseModel):
    model_config = ConfigDict(extra="allow")
    choices: list[ChatCompletionResponseChoice]
    prompt_token_ids: list[int] | None = None
"""

COMPLETION_PROTOCOL = """\
from pydantic import BaseModel, ConfigDict

class CompletionRequest(BaseModel):
    return_token_ids: bool | None = None
    echo: bool = False
    n: int = 1
    prompt_embeds: bytes | None = None

class CompletionResponseChoice(BaseModel):
    index: int = 0
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None

class CompletionResponse(BaseModel):
    model_config = ConfigDict(extra="allow")
    choices: list[CompletionResponseChoice]
"""

CHAT_SERVING = f"""\
from .protocol import ChatCompletionRequest, ChatCompletionResponse, ChatCompletionResponseChoice

class OpenAIServingChat:
    async def create_chat_completion(self, request, raw_request=None):
        if not request.return_token_ids:
            return ChatCompletionResponse(choices=[ChatCompletionResponseChoice()])
        choice = ChatCompletionResponseChoice(token_ids={RESPONSE})
        return ChatCompletionResponse(choices=[choice], prompt_token_ids={PROMPT})
"""

COMPLETION_SERVING = f"""\
from .protocol import CompletionRequest, CompletionResponse, CompletionResponseChoice

class OpenAIServingCompletion:
    async def create_completion(self, request, raw_request=None):
        return self.request_output_to_completion_response([], request)

    def request_output_to_completion_response(self, final_res_batch, request):
        if not request.return_token_ids:
            return CompletionResponse(choices=[CompletionResponseChoice()])
        choice = CompletionResponseChoice(prompt_token_ids={PROMPT}, token_ids={RESPONSE})
        return CompletionResponse(choices=[choice])

    async def completion_stream_generator(self, request, result_generator):
        yield "data: [DONE]\\n\\n"
"""

Layout = Literal["bare", "to 0.14", "from 0.15"]

# Below vllm/entrypoints/openai/.
MODULES: Mapping[Layout, Mapping[str, str]] = {
    "bare": {},
    "to 0.14": {
        "protocol.py": CHAT_PROTOCOL + COMPLETION_PROTOCOL,
        "serving_chat.py": CHAT_SERVING,
        "serving_completion.py": COMPLETION_SERVING,
    },
    "from 0.15": {
        "chat_completion/protocol.py": CHAT_PROTOCOL,
        "chat_completion/serving.py": CHAT_SERVING,
        "completion/protocol.py": COMPLETION_PROTOCOL,
        "completion/serving.py": COMPLETION_SERVING,
    },
}


def made_up_vllm(folder: Path, layout: Layout = "from 0.15", edits: Mapping[str, str] | None = None) -> None:
    """Write a package `vllm` into `folder`, to be put first on the path of a program.

    It is made up, for what no installed vLLM shows: releases that do not exist yet or are broken. What a real one
    answers is asked of a real one.

    Args:
        folder: where the package comes to lie.
        layout: where its serving modules are: as in these releases, or nowhere.
        edits: text in its files, and what stands there instead: how it differs from what the patches rely on.

    Raises:
        ValueError: if none of its files holds the text that an edit replaces.
    """
    package = folder / "vllm"
    files = {package / "__init__.py": PACKAGE}
    files |= {package / "entrypoints" / "openai" / name: text for name, text in MODULES[layout].items()}
    for old, new in (edits or {}).items():
        if not any(old in text for text in files.values()):
            raise ValueError(f"the made-up vLLM has no {old!r}")
        files = {file: text.replace(old, new) for file, text in files.items()}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for subpackage in filter(Path.is_dir, package.rglob("*")):
        (subpackage / "__init__.py").touch()
