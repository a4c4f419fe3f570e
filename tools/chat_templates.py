"""Say which chat templates append: `python -m tools.chat_templates` writes the table of docs/continuation.md.

The templates are those that TRL's wheel has, of the model families as they were released.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentlightning.continuation import CONTINUED, Answer, canonical_calls
from tests.common.continued import Served
from tests.common.templates import rendered
from tools.sections import replace_section

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "continuation.md"
CACHE = CHECKOUT / ".cache" / "wheels"
TITLE = "Which templates append"
VERSION = "1.16.0"

USER = {"role": "user", "content": "How is the weather?"}
MORE = {"role": "user", "content": "And in Rome?"}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "sunny"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "…", "parameters": {"type": "object"}}}
REFUSED = "-"
THOUGHT = "Let me see."

INTRODUCTION = f"""\
Chat templates of model families, as TRL {VERSION} has them: whether a conversation goes on from exact ids after a new
question, and after the result of a tool; without reasoning, and where the model has thought first. `{REFUSED}`: it
takes no such messages here. `seam`: a call of a tool ends with a token of its own, which was not tried. Written by
`python -m tools.chat_templates`.
"""
ADVICE = """\
To make a template append, have it write each message without looking at those that follow: no `loop.last`, no index of
the last question, no block that moves to the end. Pass it by `--chat-template`, and train with the same one.
"""


def templates(version: str = VERSION) -> dict[str, str]:
    """Return the templates by name, from TRL's wheel, which is downloaded once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wheel = CACHE / f"trl-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(CACHE),
            f"trl=={version}",
        ]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if re.fullmatch(r"trl/chat_templates/\w+\.jinja", name)]
        found = {Path(name).stem: files.read(name).decode() for name in sorted(names)}
    # TRL's own changes of them.
    return {name: text for name, text in found.items() if not name.endswith("_training")}


def outcome(template: str, answer: Answer, follows: Any) -> str:
    """Say what becomes of a prompt in which `follows` stands behind a model's answer."""
    options: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "tools": None}
    said: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        said["tool_calls"], options["tools"] = [CALL], [TOOL]
    thought = {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning} if answer.reasoning else {}
    try:
        end = _end_of_turn(template, [USER, {**said, **thought}, follows], options)
        if end is None:
            return REFUSED
        served = Served(template, end=end)
        served.call([USER], f"{answer.reasoning}{answer.text}…", answer, **options)
        result, _ = served.call([USER, said, follows], "yes", Answer("yes"), **options)
    except Exception:
        return REFUSED
    return "yes" if result == CONTINUED else result


def _end_of_turn(template: str, messages: Sequence[Any], options: Any) -> str | None:
    """Return the special token that follows an answer, as the template writes it."""
    marked = [messages[0], {"role": "assistant", "content": "ANSWER"}, MORE]
    found = re.search(r"ANSWER\s*(<[^<>\s]+>)", rendered(template, marked, **options))
    return found and found[1]


def outcomes(template: str) -> list[str]:
    """Say what becomes of a question and of a tool's result, without reasoning and with it."""
    called = canonical_calls([CALL])
    cases = (
        (Answer("It is."), MORE),
        (Answer("", called), RESULT),
        (Answer("It is.", (), THOUGHT), MORE),
        (Answer("", called, THOUGHT), RESULT),
    )
    return [outcome(template, *case) for case in cases]


def table() -> str:
    """Return the table, in Markdown."""
    lines = ["| template | question | tool | thought, question | thought, tool |", "|---|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(outcomes(template))} |" for name, template in templates().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    replace_section(PAGE, TITLE, f"{INTRODUCTION}\n{table()}\n\n{ADVICE}")
