"""`make demo`: a real vLLM, started as users start it, answers a plain and a streamed chat with token ids.

The model is tiny, with random weights: its answers are gibberish, but the ids are exact.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from tests.common.answers import gather
from tests.common.reference import tokenizer
from tests.common.tiny_model import tiny_model
from tests.common.vllm import LITTLE_CACHE, QUIET, SCRIPTS, SMALL, RemoteOpenAIServer

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 16


def table(title: str, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> None:
    """Print each token of prompt and answer with its id, five to a line."""
    print(f"\n{title}")
    for name, token_ids in (("prompt", prompt_token_ids), ("answer", response_token_ids)):
        cells = [f"{token_id:>4} {shown(token_id):<10}" for token_id in token_ids]
        for start in range(0, len(cells), 5):
            print(f"  {name if start == 0 else '':<8}{' '.join(cells[start : start + 5]).rstrip()}")


def shown(token_id: int) -> str:
    """Return a token as text on one line, spaces as dots, and bytes that are not a character as U+FFFD."""
    text = tokenizer().decode([token_id])
    text = text.replace("\n", "⏎").replace(" ", "·")
    return text if text.isprintable() else ascii(text)[1:-1]


def by_hand() -> str:
    """Return the commands that serve the tiny model and ask it, to be typed in the checkout."""
    vllm, model = (os.path.relpath(path) for path in (SCRIPTS / "vllm", tiny_model()))
    variables = " ".join(f"{name}={value}" for name, value in {"AGL_INSTRUMENT": "1", **QUIET}.items())
    options = shlex.join((*SMALL, *LITTLE_CACHE))
    wrapped = [
        line
        for text in (variables, f"{vllm} serve {model}", options)
        for line in textwrap.wrap(text, 70, break_on_hyphens=False)
    ]
    serve = " \\\n  ".join(wrapped)
    return f"""\
to serve it by hand:

  {serve}

and once it is up, in another terminal:

  curl -s localhost:8000/v1/chat/completions \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "max_tokens": {TOKENS}, "messages": [
      {json.dumps(MESSAGES[0])}]}}'"""


def main() -> None:
    print("starting: AGL_INSTRUMENT=1 vllm serve TINY_MODEL   (half a minute)", flush=True)
    with RemoteOpenAIServer(env={"AGL_INSTRUMENT": "1"}) as server:
        client = server.client()
        options: dict[str, Any] = {
            "model": server.model,
            "messages": MESSAGES,
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        print(f"asking:   {MESSAGES[0]['content']}")
        answer = client.chat.completions.create(**options)
        extra = answer.model_extra or {}
        table(
            "plain: prompt_token_ids and response_token_ids", extra["prompt_token_ids"], extra["response_token_ids"][0]
        )

        streamed = gather(client.chat.completions.create(stream=True, **options))
        table(
            "streamed: prompt_token_ids of the first chunk, token_ids of every chunk, joined",
            streamed.prompt_token_ids[0],
            streamed.token_ids[0],
        )
        same = streamed.token_ids[0] == extra["response_token_ids"][0]
        print(f"\nplain and streamed ids are {'the same' if same else 'NOT the same'}; stopping the server")
    print(f"\n{by_hand()}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
