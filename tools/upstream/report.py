"""The section of `docs/releases.md` on vLLM's own tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.machine import describe_machine
from tools.make_env import CHECKOUT
from tools.sections import replace_section
from tools.upstream.source import FOLDER

__all__ = ["table", "write_page"]

PAGE = CHECKOUT / "docs" / "releases.md"
SECTION = "vLLM's own tests"
INTRODUCTION = """\
Written by the command below, which runs the tests of vLLM's own source archive without this package, with it, and with
it recording; run it to have it written again.

```bash
make check-upstream VLLM=0.32.0 STORE=1
```

These are vLLM's tests of chat, completions, Responses, Messages, batches, tool calls, the offline `LLM`, sampling, the
engine and its output processor; `tools/upstream/selection.py` lists them. One tiny model with random weights stands for
each model that they ask for, so tests that need a GPU, another kind of model or a sensible answer fail, with and
without this package. A test with another outcome is run three more times alone, each way. It differs if its most
frequent outcome with this package never occurs without it; otherwise it is unsteady. Only known differences are
allowed.

"""
COLUMNS = ("compared", "passed in both", "failed in both", "skipped", "cut", "unsteady", "differ, known", "differ")
WITH = {"instrumented": "`AGL_INSTRUMENT`", "recording": "`AGL_INSTRUMENT` and `AGL_STORE`"}

Results = Mapping[str, Any]
"""Results of a release: by the name of the mode, the counts of the columns, and the tests."""


def write_page(version: str, result: Results) -> None:
    """Keep the result of a release, and write the section of all that are kept."""
    (FOLDER / version / "result.json").write_text(json.dumps({**result, "machine": describe_machine()}, indent=1))
    kept = {path.parent.name: json.loads(path.read_text()) for path in FOLDER.glob("*/result.json")}
    in_order = dict(sorted(kept.items(), key=lambda item: [int(number) for number in item[0].split(".")]))
    replace_section(PAGE, SECTION, INTRODUCTION + "".join(_section(in_order)))


def _section(results: Mapping[str, Results]) -> Iterator[str]:
    for name in ("processor", "system", "Python", "date"):
        yield f"- {name}: {', '.join(dict.fromkeys(result['machine'][name] for result in results.values()))}\n"
    yield f"\n{table(results)}"
    reasons = {
        test.partition("[")[0]: reason
        for result in results.values()
        for mode in WITH
        for test, (_, _, reason) in result.get(mode, {}).get("tests", {}).get("known", {}).items()
    }
    if reasons:
        yield "\nThose that differ, and are known:\n\n"
        yield from (f"- `{test}`: {reason}\n" for test, reason in sorted(reasons.items()))


def table(results: Mapping[str, Results]) -> str:
    """A row for each release and mode."""
    rows = [f"| vLLM | with | {' | '.join(COLUMNS)} | recorded |", f"|---|---|{'---:|' * (len(COLUMNS) + 1)}"]
    for version, result in results.items():
        for mode, title in WITH.items():
            if counts := result.get(mode):
                cells = " | ".join(str(counts[column]) for column in COLUMNS)
                rows.append(f"| {version} | {title} | {cells} | {counts.get('generations recorded', '-')} |")
    return "\n".join(rows) + "\n"
