"""The logits processor that makes a model follow a script; see `script`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tests.common.script import OWN_LINE, VARIABLE, line_for


@dataclass
class Line:
    """The answer that a request has to get: `said` is the answer so far, which vLLM extends."""

    token_ids: Sequence[int]
    said: Sequence[int]

    def next_id(self) -> int:
        return self.token_ids[min(len(self.said), len(self.token_ids) - 1)]


class FollowScript(LogitsProcessor):
    """Leave no choice but the script's to the requests that it has a line for."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._script = Path(os.environ[VARIABLE])
        self._tokenizer = Tokenizer.from_file(str(Path(vllm_config.model_config.tokenizer) / "tokenizer.json"))
        self._end = vllm_config.model_config.hf_config.eos_token_id
        self._lines: dict[int, Line] = {}
        """Lines, by the request's place in the batch."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._lines, batch_update, self._line)

    def _line(self, params: Any, prompt_ids: Sequence[int] | None, said: Sequence[int]) -> Line | None:
        line = (params.extra_args or {}).get(OWN_LINE)
        if line is None:
            line = line_for(self._script, self._tokenizer.decode(prompt_ids or [], skip_special_tokens=False))
        if line is None:
            return None
        return Line([*self._tokenizer.encode(line, add_special_tokens=False).ids, self._end], said)

    def apply(self, logits: Any) -> Any:
        for place, line in self._lines.items():
            logits[place] = float("-inf")
            logits[place, line.next_id()] = 0.0
        return logits
