"""Which vLLM is there, what of it is patched, and what keeps vLLM from asking Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from agentlightning.doctor import Finding, Mark
from agentlightning.doctor.installation import PTH, interpreter
from agentlightning.doctor.presence import what_is_missing
from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm import _releases

__all__ = ["findings", "of_an_unknown_release", "of_patches"]

PROBE_SECONDS = 600
# Importing us arms a process where the variable is on; that must not hide whether Python arms it by itself.
PROBE = """\
import os, sys
switch = os.environ.pop("AGL_INSTRUMENT")
from agentlightning.doctor import probe
os.environ["AGL_INSTRUMENT"] = switch
probe.main(sys.argv[1])
"""


def findings() -> Iterator[Finding]:
    """What becomes of the vLLM that this interpreter has. Takes as long as importing vLLM does."""
    missing = what_is_missing()
    if missing:
        text, _, advice = missing.partition("; ")
        yield Finding("vLLM", Mark.PROBLEM, text, advice)
        return
    outcome = _probed()
    yield _version(outcome)
    patches, not_imported = outcome.get("patches", {}), outcome.get("not_imported", {})
    yield from of_an_unknown_release(outcome.get("version"), patches)
    yield from of_patches(patches)
    yield from _not_imported(not_imported)
    # All that there is to patch has been imported: nothing can be pending that we were asked for.
    pending = [name for name, patch in patches.items() if patch["state"] == "pending"]
    if pending and not not_imported:
        yield Finding(
            "vLLM",
            Mark.PROBLEM,
            f"it was imported past our import hook, which leaves it unpatched: {', '.join(pending)}",
            f"see what is said of {PTH} and of finders",
        )
    if outcome.get("finders_ahead"):
        yield _finders(outcome["finders_ahead"], all(patch["state"] == "applied" for patch in patches.values()))
    yield from _past_python()


def of_patches(patches: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """What the states of the patch sets mean, here or on a server.

    Args:
        patches: state and reason of each patch set by its name, as `Status.as_dict` gives them.
    """
    for name, patch in patches.items():
        state, reason = patch["state"], patch["reason"]
        if state == "pending":
            reason = reason or "this process has not imported it, others may have"
        text = f"{state}: {reason}" if reason else f"{state}"
        if state == "failed":
            advice = (
                "use a release of vLLM that the README lists, or a newer agentlightning; until then answers lack this"
            )
            yield Finding(name, Mark.PROBLEM, text, advice)
        else:
            yield Finding(name, Mark.OK if state == "applied" else Mark.NOTE, text)


def of_an_unknown_release(version: Any, patches: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """Say which patch sets have found their targets, in a vLLM that is newer than all known ones; else nothing.

    Args:
        version: vLLM's; None where it is not known.
        patches: as for `of_patches`.
    """
    if not isinstance(version, str) or not _releases.is_before(_releases.NEWEST_KNOWN, version):
        return
    applied = [name for name, patch in patches.items() if patch["state"] == "applied"]
    left_off = [f"{name} ({patch['state']})" for name, patch in patches.items() if patch["state"] != "applied"]
    found = (
        f"all {len(patches)} patch sets have" if not left_off else f"{len(applied)} of {len(patches)} patch sets have"
    )
    others = f"; not {', '.join(left_off)}" if left_off else ""
    text = (
        f"{version} is newer than any release that this agentlightning was tested with ({_releases.NEWEST_KNOWN}): "
        f"{found} found what they patch in it{others}"
    )
    yield Finding("release", Mark.NOTE, text)


def _not_imported(modules: Mapping[str, str]) -> Iterator[Finding]:
    for module, reason in modules.items():
        yield Finding(
            "vLLM",
            Mark.PROBLEM,
            f"{module} cannot be imported, so vLLM does not serve it: {reason}",
            f"see the whole error: {sys.executable} -c 'import {module}'",
        )


def _finders(ahead: Sequence[str], all_applied: bool) -> Finding:
    text = f"asked before ours on sys.meta_path: {', '.join(ahead)}"
    if all_applied:
        return Finding("finders", Mark.NOTE, f"{text}; harmless, since all is applied")
    return Finding("finders", Mark.NOTE, text, "what one of them finds by itself cannot be patched: do without it")


def _probed() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="agl-doctor-") as folder:
        file = Path(folder, "outcome.json")
        probe = [*interpreter(), "-c", PROBE, str(file)]
        try:
            # Not strict: it would end the probe instead of telling.
            ran = subprocess.run(
                probe,
                env={**os.environ, "AGL_INSTRUMENT": "1"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"importing it took more than {PROBE_SECONDS} s"}
        if file.is_file():
            return json.loads(file.read_text())
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"importing it ended the process with status {ran.returncode}: {last}"}


def _version(outcome: Mapping[str, Any]) -> Finding:
    vllm = locate("vllm")
    where = os.path.dirname(vllm.origin) if vllm is not None and vllm.origin else "nowhere"
    owners = _owners(Path(where))
    if "error" in outcome:
        return Finding(
            "vLLM",
            Mark.PROBLEM,
            f"the vLLM in {where} ({', '.join(owners) or 'of no distribution'}) cannot be imported: {outcome['error']}",
            f"see the whole error: {sys.executable} -c 'import vllm'",
        )
    if len(owners) > 1:
        return Finding(
            "vLLM",
            Mark.PROBLEM,
            f"{' and '.join(owners)} are installed over each other in {where}",
            "uninstall them all, and install one",
        )
    return Finding("vLLM", Mark.OK, f"{outcome['version']} ({', '.join(owners) or 'of no distribution'}), in {where}")


def _owners(folder: Path) -> list[str]:
    """The distributions whose files `folder` holds: vLLM is known by several names, and by a name without files."""
    init = (folder / "__init__.py").resolve()
    return sorted(
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in distributions()
        if any(
            file.parts == ("vllm", "__init__.py") and Path(str(distribution.locate_file(file))).resolve() == init
            for file in distribution.files or ()
        )
    )


def _past_python() -> Iterator[Finding]:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        yield Finding(
            "Rust frontend",
            Mark.PROBLEM,
            "VLLM_USE_RUST_FRONTEND is set: answers carry token ids only where a request asks for them",
            'unset it, or let requests say "return_token_ids": true',
        )
    if os.environ.get("VLLM_USE_V1") == "0":
        yield Finding(
            "V0 engine",
            Mark.PROBLEM,
            "VLLM_USE_V1=0 asks releases to 0.10 for their old engine, whose answers are not complete",
            "unset it",
        )
