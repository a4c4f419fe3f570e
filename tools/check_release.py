"""Say of a vLLM whether all that is patched is there: `make check-release VLLM=0.34.0`, or a wheel file.

Reads its source, and imports nothing of it. What is looked for, and how, are the patch sets of the package themselves:
they are checked as they are where vLLM runs, against stubs of the modules that are in the wheel.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from agentlightning.instrumentation.vllm import PATCH_SETS, _releases
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.endpoints.fields import ExtraField, RequestField
from agentlightning.patching import Mismatch, NotForThisRelease, Patch, PatchSet, Where, Wrap
from tests.releases.table import COMPILED, RELEASES
from tools import wheels
from tools.sections import replace_section
from tools.sources import Source

CHECKOUT = Path(__file__).parents[1]
CACHE = CHECKOUT / ".cache" / "wheels"
PAGE = CHECKOUT / "docs" / "releases.md"
OLDEST = "0.8.5"
ENTRY_POINTS = "vllm.entrypoints"
MOST_NAMED = 3

THERE, NOT_FOR_THIS_RELEASE, MISSING = "there", "not for this release", "missing"


@dataclass(frozen=True)
class Outcome:
    """Outcome of the check of one patch set.

    Attributes:
        name: the set's.
        state: whether all that it patches is there, or the release is not what it is for.
        module: where it was looked for; None where the release has no such module.
        details: what is missing, and where the same name is defined instead; or why the set is not for the release.
    """

    name: str
    state: str
    module: str | None
    details: Sequence[str] = ()


def check(source: Source, version: str) -> list[Outcome]:
    """Check every patch set against a release's source."""
    with _as_if_imported(version):
        return [_check(patch_set, source, version) for patch_set in PATCH_SETS]


def _check(patch_set: PatchSet, source: Source, version: str) -> Outcome:
    home = next((module for module in patch_set.modules if module in source), None)
    if home is None:
        if patch_set.since and _releases.is_before(version, patch_set.since):
            return Outcome(patch_set.name, NOT_FOR_THIS_RELEASE, None, (f"came with vLLM {patch_set.since}",))
        details = [f"no module {' or '.join(patch_set.modules)}"]
    else:
        details = []
        for patch in patch_set.patches:
            try:
                _check_patch(patch, source.module(home))
            except NotForThisRelease as reason:
                return Outcome(patch_set.name, NOT_FOR_THIS_RELEASE, home, (str(reason),))
            except Exception as error:
                details.append(_reason(error))
        if not details:
            return Outcome(patch_set.name, THERE, home)
    return Outcome(patch_set.name, MISSING, home, (*dict.fromkeys(details), *_elsewhere(patch_set, source, home)))


def _check_patch(patch: Patch, module: ModuleType) -> None:
    # A module that only imports it will do, as where vLLM runs.
    getattr(module, _name(patch), None)
    patch.check(module)


def _elsewhere(patch_set: PatchSet, source: Source, home: str | None) -> Iterator[str]:
    """Find where the targets of the set are defined instead, and whether the set would fit there."""
    names = dict.fromkeys(map(_name, patch_set.patches))
    found = [set(source.defining(name)) for name in names]
    together = set.intersection(*found) - {home}
    for module in sorted(together):
        wrong = [reason for patch in patch_set.patches if (reason := _mismatch(patch, source.module(module)))]
        yield f"{', '.join(names)} moved to {module}: {'; '.join(wrong) or 'all is there'}"
    if not together:
        for name, modules in zip(names, found, strict=True):
            if home not in modules and modules:
                yield f"{name} is defined in {_some(sorted(modules))}"
    present = home is not None and all(getattr(source.module(home), name, None) for name in names)
    for method in dict.fromkeys(filter(None, map(_method, patch_set.patches))):
        if home is not None and present and _mismatch_of_method(patch_set, method, source.module(home)):
            # The very class is named already, with what is wrong with its method.
            others = [other for other in source.with_method(method, "vllm") if not _is_in(home, names, other)]
            if others:
                yield f"{method} is a method of {_some(others)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def _is_in(module: str, names: Iterable[str], other: str) -> bool:
    return other in {f"{module}.{name}" for name in names}


def _mismatch_of_method(patch_set: PatchSet, method: str, module: ModuleType) -> bool:
    return any(_mismatch(patch, module) for patch in patch_set.patches if _method(patch) == method)


def _mismatch(patch: Patch, module: ModuleType) -> str | None:
    try:
        _check_patch(patch, module)
    except NotForThisRelease:
        return None
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    # As PatchSet.apply says it.
    return str(error) if isinstance(error, Mismatch) else " ".join(repr(error).split())


def _name(patch: Patch) -> str:
    """The class or function that a patch looks up in its module."""
    match patch:
        case Where():
            return _name(patch.patch)
        case Wrap():
            return patch.target.partition(".")[0]
        case ExtraField() | RequestField():
            return patch.model
    raise TypeError(f"what does {patch!r} look up?")


def _method(patch: Patch) -> str:
    match patch:
        case Where():
            return _method(patch.patch)
        case Wrap():
            return patch.target.partition(".")[2]
    return ""


@contextmanager
def _as_if_imported(version: str) -> Iterator[None]:
    """Set what patches read besides the module: vLLM's version, and that all generations are recorded and continued."""
    vllm: Any = ModuleType("vllm")
    vllm.__version__ = version
    asked_for = {"AGL_STORE": "checked.db", "AGL_RECORD_OFFLINE": "on", "AGL_CONTINUE": "on", "AGL_SAMPLING": "report"}
    with mock.patch.dict(sys.modules, {"vllm": vllm}), mock.patch.dict(os.environ, asked_for):
        session.begin()
        try:
            yield
        finally:
            session.begin()


def entry_points(source: Source) -> dict[str, set[str]]:
    """Collect what serves in a release: routes, serving classes, and launchers of servers."""
    found: dict[str, set[str]] = {"routes": set(), "serving classes": set(), "launchers": set()}
    for module in source.below(ENTRY_POINTS):
        tree = source.tree(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and "Serving" in node.name:
                found["serving classes"].add(node.name)
            elif isinstance(node, ast.ClassDef) and any(_ends(base) == "CLISubcommand" for base in node.bases):
                found["launchers"].add(node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found["routes"].update(_routes(node))
                if any(isinstance(call, ast.Call) and _starts_a_server(call) for call in ast.walk(node)):
                    found["launchers"].add(f"{node.name}()")
    return found


def _routes(handler: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in handler.decorator_list:
        if (
            isinstance(decorator, ast.Call)
            and isinstance(decorator.func, ast.Attribute)
            and _ends(decorator.func) in ("get", "post", "put", "delete", "patch", "head", "websocket")
            and decorator.args
        ):
            path = decorator.args[0]
            text = path.value if isinstance(path, ast.Constant) else ast.unparse(path)
            yield f"{_ends(decorator.func).upper()} {text}"


def _starts_a_server(call: ast.Call) -> bool:
    # A server of uvicorn's or of gRPC's, or vLLM's own function for the former.
    name = ast.unparse(call.func)
    return name == "serve_http" or name.startswith("uvicorn.") or name.endswith("aio.server")


def _ends(expression: ast.expr) -> str:
    return ast.unparse(expression).rpartition(".")[2]


def new_entry_points(source: Source, known: Source) -> dict[str, list[str]]:
    """Find entry points that a known release does not have and no set patches."""
    patched = {_name(patch) for patch_set in PATCH_SETS for patch in patch_set.patches}
    before = entry_points(known)
    return {kind: sorted(names - before[kind] - patched) for kind, names in entry_points(source).items()}


def tested(version: str) -> str:
    """Say how the tests run a release."""
    row = next((row for row in RELEASES if row.version == version), None)
    if row is None:
        return "only read"
    if row.hybrid:
        return "run as a hybrid"
    return "run whole" if row.worker == COMPILED else "run with a stand-in"


def archive_of(release: str) -> tuple[str, Path]:
    """A version, or a wheel's file: its version, and a zip file of its source.

    Raises:
        ValueError: where there is none.
    """
    if not release.endswith(".whl"):
        return release, wheels.source(release, CACHE)
    wheel = Path(release)
    if not wheel.is_file():
        raise ValueError(f"no file {wheel}")
    # A wheel is a zip file of its own.
    return wheel.name.split("-")[1].partition("+")[0], wheel


def report(release: str, known: str) -> dict[str, Any]:
    """Check a release, and compare its entry points with those of a known one."""
    version, archive = archive_of(release)
    source = Source(archive)
    outcomes = check(source, version)
    return {
        "version": version,
        "ok": all(outcome.state != MISSING for outcome in outcomes),
        "tested": tested(version),
        "patch_sets": [asdict(outcome) for outcome in outcomes],
        "new": new_entry_points(source, Source(archive_of(known)[1])),
        "new_since": archive_of(known)[0],
    }


def _print(result: dict[str, Any]) -> None:
    print(f"vLLM {result['version']} ({result['tested']})\n")
    for outcome in result["patch_sets"]:
        print(f"{outcome['state']:<20}  {outcome['name']:<17}  {outcome['module'] or '-'}")
        for detail in outcome["details"]:
            print(f"{'':<41}  {detail}")
    for kind, names in result["new"].items():
        print(f"\n{kind} that {result['new_since']} does not have, and nothing patches: {', '.join(names) or 'none'}")
    print("\nAll that is patched is there." if result["ok"] else "\nNot all that is patched is there.")


def _run_row(version: str) -> int:
    """Run the row of the matrix, where there is one; returns an exit status."""
    if tested(version) == "only read":
        print(
            f"\nNot run: tests/releases/table.py has no row {version}. Where vLLM has a CPU build of it, or its Python "
            f"runs over the compiled part of the newest that has one (hybrid=True), add the row; then: "
            f"make test-releases RELEASES={version}"
        )
        return 0
    for module in (("tests.releases.environments", version), ("pytest", "tests/releases", f"--releases={version}")):
        status = subprocess.run([sys.executable, "-m", *module], cwd=CHECKOUT, check=False).returncode
        if status:
            return status
    return 0


SECTION = "What is there in each release"
INTRODUCTION = """\
Written by `python -m tools.check_release --all`, which reads the source of every release on the package index and
runs none of them: are the module, the class, the method and the parameters there that each set of patches relies on?
It checks the patch sets themselves, as they are checked where vLLM runs, against stubs made of the source. What a
decorator makes of a method, and what a method does, it cannot see; the tests can.

`make check-release VLLM=0.34.0` reads another release, or the file of a wheel. Where something is missing, it says
where a class or function of that name is now. It lists the routes, serving classes and launchers that the newest
known release does not have, and then runs the tests above, if they have a row for the release.

The last column says how far a release was tested:

- *run whole*: vLLM as it is, with a model.
- *run as a hybrid*: all of its own Python, with a model, over the compiled part of an earlier release.
- *run with a stand-in*: all of vLLM but the model, whose place a worker of the tests takes.
- *only read*: nothing but this table.

"""


def _write_page() -> bool:
    versions = [version for version in wheels.releases() if not _releases.is_before(version, OLDEST)]
    versions = versions[: versions.index(OLDEST) + 1]
    results = []
    for version in versions:
        print(version, flush=True)
        results.append((version, check(Source(wheels.source(version, CACHE)), version)))
    replace_section(PAGE, SECTION, INTRODUCTION + "".join(_table(results)))
    return all(outcome.state != MISSING for _, outcomes in results for outcome in outcomes)


def _table(results: Sequence[tuple[str, Sequence[Outcome]]]) -> Iterator[str]:
    yield "| vLLM | sets there | not for this release | missing | tested |\n|---|---:|---|---|---|\n"
    reasons: dict[tuple[str, str], list[str]] = {}
    for version, outcomes in results:
        names = {
            state: ", ".join(outcome.name for outcome in outcomes if outcome.state == state)
            for state in (NOT_FOR_THIS_RELEASE, MISSING)
        }
        there = sum(outcome.state == THERE for outcome in outcomes)
        left = " | ".join(text or "-" for text in names.values())
        yield f"| {version} | {there} of {len(outcomes)} | {left} | {tested(version)} |\n"
        for outcome in outcomes:
            for detail in outcome.details:
                reasons.setdefault((outcome.name, detail), []).append(version)
    yield "\nWhy a set is left off:\n\n"
    for (name, detail), versions in reasons.items():
        # They come one after the other, the newest first.
        of = versions[0] if len(versions) == 1 else f"{versions[-1]} to {versions[0]}"
        yield f"- {name} ({of}): {detail}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_release", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("release", nargs="?", help="a version of vLLM on the package index, or the file of a wheel")
    parser.add_argument("--all", action="store_true", help=f"each from {OLDEST} on, for docs/releases.md")
    parser.add_argument("--known", default=_releases.NEWEST_KNOWN, help="what serves is compared with this one's")
    parser.add_argument("--run", action="store_true", help="then run the tests on it, where they have a row for it")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args()
    if options.all:
        return 0 if _write_page() else 1
    if options.release is None:
        parser.error("which release? make check-release VLLM=VERSION, or a wheel's file")
    try:
        result = report(options.release, options.known)
    except ValueError as error:
        sys.exit(f"check_release: {error}")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    status = 0 if result["ok"] else 1
    return status or (_run_row(result["version"]) if options.run else 0)


if __name__ == "__main__":
    sys.exit(main())
