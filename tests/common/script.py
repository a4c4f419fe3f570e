"""Scripts for a model: what it says to which prompt, so that real agents can be led through tools and sub-agents.

A script is a list of lines, each with a cue, a regular expression. The model says the line of the last cue that its
prompt has:

    write(script, {
        "Count the files": call("bash", command="echo 3 files"),
        "(?P<count>[0-9]+) files": "There are $count.",
    })

So no call is counted: one that is tried again gets the same line, and calls in parallel get their own. A prompt
without a cue is answered by the model as it is. A request may also bring its line:

    vllm_xargs={"line": "There are 3."}

Everything but the choice of ids is vLLM's own: templates, parsers, streams, the prefix cache, and the `raw_logprobs`,
which it computes before. `script_processor` is what makes the model follow it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from tests.common.environments import CHECKOUT
from tests.common.tiny_model import TOOLS_FIRST, tiny_model

__all__ = [
    "MODEL",
    "OWN_LINE",
    "PROCESSOR",
    "TOOLS",
    "VARIABLE",
    "arguments",
    "call",
    "compact_call",
    "environment",
    "line_for",
    "write",
]

VARIABLE = "SCRIPT"
OWN_LINE = "line"
PROCESSOR = "--logits-processors=tests.common.script_processor:FollowScript"
"""The argument of `vllm serve` with which a model follows a script."""
MODEL = "Qwen/Qwen3-0.6B"
"""The name that the model is served by beside its own: it is the one in the documentation."""
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
# Agents' instructions and tools are 8,000 to 33,000 of the tiny model's ids, and some ask for 32,000 in return.
LENGTH = 131_072
LONG_PROMPTS = (
    f"--max-model-len={LENGTH}",
    f"--hf-overrides={json.dumps({'max_position_embeddings': LENGTH})}",
    "--max-num-batched-tokens=8192",
)


def arguments() -> tuple[str, ...]:
    """Return the arguments of `vllm serve` with which the tiny model follows a script, and takes agents' prompts."""
    names = ("--served-model-name", str(tiny_model()), MODEL)
    template = f"--chat-template={TOOLS_FIRST}", "--trust-request-chat-template"
    return (*names, *TOOLS, *LONG_PROMPTS, *template, PROCESSOR)


def environment(script: Path) -> dict[str, str]:
    """Return the variables of a server that follows this script, which may be written at any time."""
    return {VARIABLE: str(script), "PYTHONPATH": str(CHECKOUT), "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


def write(script: Path, lines: Mapping[str, str]) -> None:
    """Write the lines, by cue, that the model follows from now on."""
    # Renamed when it is whole, since the server may read it at any moment.
    with tempfile.NamedTemporaryFile("w", dir=script.parent, delete=False) as whole:
        json.dump([*lines.items()], whole)
    os.replace(whole.name, script)


def line_for(script: Path, prompt: str) -> str | None:
    """Return the line that the script has for a prompt, with the named groups of its cue in place."""
    lines = json.loads(script.read_text()) if script.exists() else []
    found = ((re.search(cue, prompt), line) for cue, line in reversed(lines))
    return next((Template(line).safe_substitute(cue.groupdict()) for cue, line in found if cue), None)


def call(tool: str, **arguments: Any) -> str:
    """Return the line that calls a tool, as the `hermes` parser takes it."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def compact_call(tool: str, **arguments: Any) -> str:
    """Return the same in JSON without white space, as no template writes it: the next prompt breaks off here."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments}, separators=(',', ':'))}\n</tool_call>"
