"""A tool loop for /v1/responses of a model that never asks for a tool by itself."""

from __future__ import annotations

from pathlib import Path

MADE_UP_TOOL_LOOP = """\
# A tool that vLLM is told to call once, and that answers nothing: random weights never ask for one. What the model is
# asked for before and after it is real.
from agentlightning.importhook import when_imported

def loop(context):
    def need_builtin_tool_call(self):
        first, self.called = not getattr(self, "called", False), True
        return first

    async def call_tool(self):
        return []

    context.SimpleContext.need_builtin_tool_call = need_builtin_tool_call
    context.SimpleContext.call_tool = call_tool
    context.SimpleContext.append_tool_output = lambda self, output: None

when_imported("vllm.entrypoints.openai.responses.context", loop)
"""


def with_tool_loop(folder: Path) -> Path:
    """The folder, which a server is to have on its `PYTHONPATH`: there each response takes two calls of the model."""
    (folder / "sitecustomize.py").write_text(MADE_UP_TOOL_LOOP)
    return folder
