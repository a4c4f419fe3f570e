"""`agl doctor`: check that it is on, here or on a running server, and if not, say why."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import agentlightning
from agentlightning import instrumentation, settings
from agentlightning.cli import interruption
from agentlightning.cli.arguments import Parser
from agentlightning.doctor import (
    Finding,
    Mark,
    Unreachable,
    all_is_well,
    carriers,
    environment,
    patches,
    recording,
    server,
)
from agentlightning.doctor.vllm import missing_vllm

WIDTH = 80
COLOURS = {Mark.OK: "32", Mark.NOTE: "33", Mark.PROBLEM: "31;1"}
DESCRIPTION = "Say whether answers will carry token ids and be recorded, and if not, why and what to do."
EPILOG = """\
Without --url and --store it checks the environment that it runs in, and whether the store of AGL_STORE can be used,
within seconds; then it imports vLLM as a server would, in a process of its own, which takes ten to sixty more.
With --url it asks a running server, maybe behind a router, and makes one call of one token with each way to name a
rollout, to see which of them arrive; with --store it reads what was recorded. It writes to no store. The exit status
is 0 when all is well, 1 when there is a problem."""
IMPORTING = "importing vLLM as a server would (ten to sixty seconds) ..."
TRYING = "trying each way to name a rollout, with one short call over each endpoint ..."
NOT_IMPORTED = Finding("patches", Mark.NOTE, "not tried: that needs an import of vLLM, which --quick leaves out")


def main(arguments: Sequence[str]) -> int:
    """Run `agl doctor` and return its exit status."""
    options = _options(arguments)
    report: dict[str, Any] = {}
    if options.url is not None:
        title = f"the server at {options.url}"
        report, findings = _examine("server", lambda: server.read(options.url, options.api_key), server.findings)
        report["carriers"] = {}
        if carriers.may_arrive(report["server"]):
            if not options.json:
                _print([TRYING, ""])
            report["carriers"] = carriers.read(options.url, options.api_key)
            findings = carriers.findings_with(report["server"], findings, report["carriers"])
    elif options.store is not None:
        title = f"the store at {settings.without_secrets(options.store)}"
        report, findings = _examine("store", lambda: recording.read(options.store, options.rollout), recording.findings)
    else:
        title = f"{sys.executable} (Python {sys.version.split()[0]})"
        findings = _local(options)
    if options.json:
        found = list(findings)
        answer = {"ok": all_is_well(found), "findings": [finding.as_dict() for finding in found]}
        sys.stdout.write(f"{json.dumps(answer | report, indent=2)}\n")
    else:
        found = _tell(title, findings)
    return 0 if all_is_well(found) else 1


def _examine(
    what: str, read: Callable[[], dict[str, Any]], explain: Callable[[dict[str, Any]], Iterable[Finding]]
) -> tuple[dict[str, Any], list[Finding]]:
    """Read the report of a server or a store, and explain it; return both."""
    try:
        report = read()
    except Unreachable as reason:
        text, advice = reason.args
        return {what: {}}, [Finding(what, Mark.PROBLEM, text, advice)]
    return {what: report}, list(explain(report))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rollout is not None and options.store is None:
        parser.error("--rollout needs --store")
    return options


def _parser() -> Parser:
    parser = Parser(prog="agl doctor", description=DESCRIPTION, epilog=EPILOG)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--url", metavar="http://HOST:PORT", help="ask this server instead")
    instead.add_argument("--store", metavar="URL", help="look into this store instead")
    instead.add_argument("--quick", action="store_true", help="leave out the import of vLLM")
    parser.add_argument("--rollout", metavar="ID", help="say why the store has no data of this rollout")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("VLLM_API_KEY"),
        help="the key of the vLLM server at --url (default: VLLM_API_KEY); for a store, set AGL_STORE_KEY",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


def _local(options: argparse.Namespace) -> Iterator[Finding]:
    """Check this environment, the slowest checks last."""
    yield from environment.findings()
    yield from patches.installed()
    yield from recording.destination()
    if options.quick:
        yield NOT_IMPORTED
    elif missing_vllm() is None:
        # Not in JSON: only a user who waits has to be told.
        if not options.json:
            _print(["", IMPORTING, ""])
        with interruption.unwinding():
            # So that the process that imports vLLM, and its folder, are gone as well.
            found = list(patches.findings())
        yield from found


def _tell(title: str, findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as soon as it is found, and return them all."""
    found: list[Finding] = []
    colours = _is_terminal(sys.stdout)
    _print([*_wrapped(f"agl doctor {agentlightning.__version__}: {title}", WIDTH), ""])
    subjects = [finding.subject for finding in findings] if isinstance(findings, list) else _subjects()
    width = max(map(len, subjects))
    for finding in findings:
        _print(_block(finding, width, colours))
        found.append(finding)
    problems = sum(finding.mark is Mark.PROBLEM for finding in found)
    _print(["", "All is well." if not problems else f"{problems} problem{'s' if problems > 1 else ''}."])
    return found


def _subjects() -> list[str]:
    """Return the subjects that findings on this environment may have; they set the width of the first column."""
    return [environment.PTH, *instrumentation.status(), *filter(settings.read, settings.VARIABLES)]


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    # A pipe would keep them until all is over.
    sys.stdout.flush()


def _block(finding: Finding, width: int, colours: bool) -> Iterator[str]:
    """Format a finding: mark and subject, and beside them its text, with the advice below."""
    mark = f"{finding.mark.value:<7}"
    indent = " " * (len(mark) + 2 + width + 2)
    texts = [finding.text, *([f"-> {finding.advice}"] if finding.advice else [])]
    body = [line for text in texts for line in _wrapped(text, max(WIDTH - len(indent), 20))] or [""]
    head = f"\033[{COLOURS[finding.mark]}m{mark}\033[0m" if colours else mark
    yield f"{head}  {finding.subject:<{width}}  {body[0]}"
    yield from (indent + line for line in body[1:])


def _wrapped(text: str, width: int) -> Iterable[str]:
    # Paths and commands stay whole, so that they can be copied.
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _is_terminal(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
