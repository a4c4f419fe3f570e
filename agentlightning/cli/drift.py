"""`agl drift`: say where prompts are not what the model saw and said before, and why."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

import agentlightning
from agentlightning import settings
from agentlightning.cli import interruption, no_match
from agentlightning.cli.arguments import Parser, nanoseconds
from agentlightning.drift import ABOUT, MEANT, UNFIT, AttemptDrift, Break, Cause, Report, Token
from agentlightning.errors import StoreError
from agentlightning.store import open_store

DESCRIPTION = """\
Compare the prompt of each call with what the model saw and said before, name what breaks it, and say what ends that."""
EPILOG = """\
docs/drift.md explains the report. Breaks that an agent means (a retry, a sub-agent, a compaction) are counted, but are
no drift. Exit status: 0; 1 if more conversations broke than --fail-above, or if there is nothing to report on."""

OUTPUT_CLOSED = 128 + signal.SIGPIPE
PERCENT = 100
TOKENS_SHOWN = 7
LONGEST_TEXT = 24
WIDTH = 80
INDENT = " " * 8


def main(arguments: Sequence[str]) -> int:
    """Run `agl drift` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.store:
        parser.error("which store? Give --store, or set AGL_STORE")
    names = ("rollout_id", "attempt_id", "since", "model")
    filters: Any = {name: value for name in names if (value := getattr(options, name)) is not None}
    report = Report()
    try:
        with open_store(options.store, read_only=True) as store, interruption.unwinding():
            # None: no progress bar unless stderr is a terminal.
            with tqdm(store.drift(**filters), unit=" attempts", disable=None) as attempts:
                for each in attempts:
                    report.add(each)
            nothing = None if report.attempts else no_match.explain(store, "attempts", filters)
        if nothing is not None:
            sys.stderr.write(f"{parser.prog}: {nothing}\n")
            return 1
        _write(json.dumps(report.as_dict(), indent=2) if options.json else "\n".join(lines_of(report, options.brief)))
    except BrokenPipeError:
        # Python flushes stdout when it exits, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (StoreError, OSError) as reason:
        sys.stderr.write(f"{parser.prog}: {reason}\n")
        return 1
    if options.fail_above is not None and report.share_broken > options.fail_above:
        limit = f"{options.fail_above:.1%}"
        sys.stderr.write(f"{parser.prog}: {report.share_broken:.1%} of the conversations broke, more than {limit}\n")
        return 1
    return 0


def lines_of(report: Report, brief: bool) -> Iterator[str]:
    """Yield the lines of a report.

    Args:
        brief: without examples and cures.
    """
    sums, total = report.sums, report.sums["kept"] + report.sums["lost"]
    conversations = _counted(sums["conversations"], "conversation")
    yield (
        f"{_counted(sums['calls'], 'call')} in {conversations} of {_counted(report.attempts, 'attempt')}; "
        f"{sums['broken']} broke ({report.share_broken:.1%})"
    )
    rows = [sums[name] for name in ("rows_before", "rows_after", "rows_unbroken")]
    yield f"rows: {rows[0]} before merging, {rows[1]} after, {rows[2]} if nothing had broken"
    yield (
        f"sampled ids: {sums['kept']} kept by one row for each conversation, {sums['lost']} lost "
        f"({_percent(sums['lost'], total)})"
    )
    if report.cached is not None:
        yield (
            f"prefix cache: {report.cached} ids of continuing calls, of {sums['cacheable']} with an exact history "
            f"({_percent(report.cached, sums['cacheable'])})"
        )
    if sums["without_vocabulary"]:
        count = _counted(sums["without_vocabulary"], "call")
        yield f"of {count} the ids alone are known, and no vocabulary: their breaks have no certain cause"
    for cause, count in report.causes.items():
        yield from _cause(report, cause, count, brief)
    if report.behind:
        yield from ("", "once these are gone, what breaks the same prompts next:")[brief:]
        yield from (f"{count:>7} {cause}: {ABOUT[cause].title}" for cause, count in report.behind.items())
    if not brief and report.unfit:
        yield from ("", "besides, unfit for training:")
        yield from (f"{count:>7} {UNFIT[name]}" for name, count in report.unfit.items())


def _cause(report: Report, cause: Cause, count: int, brief: bool) -> Iterator[str]:
    certain = report.certain[cause]
    doubt = "" if certain == count else f", {count - certain} of them uncertain"
    meant = ", meant" if cause in MEANT else ""
    attempt, found = report.examples[cause]
    if not brief:
        yield ""
    yield f"{count:>7} {cause}: {ABOUT[cause].title}{meant}{doubt}"
    if brief:
        return
    yield from _example(attempt, found)
    yield from textwrap.wrap(ABOUT[cause].cure, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def _example(attempt: AttemptDrift, found: Break) -> Iterator[str]:
    place = f"id {found.position}"
    if found.message is not None:
        role = f" ({found.role})" if found.role else ""
        place = f"message {found.message}{role}, {place}"
    of_attempt = f", attempt {attempt.attempt_id}" if attempt.attempt_id else ""
    yield f"{INDENT}rollout {attempt.rollout_id}{of_attempt}"
    then = f"; then {', '.join(found.also)}" if found.also else ""
    yield f"{INDENT}generation {found.generation_id}: {place}{then}"
    if found.before or found.after:
        yield f"{INDENT}  before: {_side(found.before)}"
        yield f"{INDENT}  now:    {_side(found.after)}"


def _side(tokens: Sequence[Token]) -> str:
    shown = " ".join(map(_token, tokens[:TOKENS_SHOWN])) + (" ..." if len(tokens) > TOKENS_SHOWN else "")
    return shown or "(ends here)"


def _token(token: Token) -> str:
    """Write an id with its text, in brackets where the other side has another."""
    text = "" if token.text is None else f" {json.dumps(token.text[:LONGEST_TEXT], ensure_ascii=False)}"
    return f"[{token.id}{text}]" if token.differs else f"{token.id}{text}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _write(text: str) -> None:
    # A text may have half of a surrogate pair.
    sys.stdout.write(text.encode("utf-8", "replace").decode() + "\n")
    sys.stdout.flush()


def _parser() -> Parser:
    parser = Parser(prog="agl drift", description=DESCRIPTION, epilog=EPILOG)
    store = settings.read("AGL_STORE")
    parser.add_argument("--store", metavar="URL", default=store, help="the store to read (default: AGL_STORE)")
    parser.add_argument("--rollout", metavar="ID", dest="rollout_id", help="only this rollout")
    parser.add_argument("--attempt", metavar="ID", dest="attempt_id", help="only this attempt")
    parser.add_argument("--model", metavar="NAME", help="only calls of this model")
    since = "only rollouts of which a call finished then or later, written like 2026-11-24T10:30"
    parser.add_argument("--since", metavar="TIME", type=nanoseconds, help=since)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write the report as JSON")
    form.add_argument("--brief", action="store_true", help="write the numbers and causes alone")
    fail = "exit with 1 if more than this share of the conversations broke, such as 1%%"
    parser.add_argument("--fail-above", metavar="SHARE", type=_share, help=fail)
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


def _share(text: str) -> float:
    try:
        number = float(text.removesuffix("%")) / (PERCENT if text.endswith("%") else 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; write it like 1%") from error
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0% and 100%")
    return number
