"""The installed vLLM: its version, its patches, and settings that bypass its Python frontend."""

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
from agentlightning.doctor.environment import PTH, interpreter
from agentlightning.doctor.vllm import missing_vllm
from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm import _releases

__all__ = ["findings", "installed", "patch_findings", "release_findings"]

PROBE_SECONDS = 600
# Importing this package with the variable on arms the process. That must not hide whether Python arms it by itself.
PROBE = """\
import os, sys
switch = os.environ.pop("AGL_INSTRUMENT")
from agentlightning.doctor.vllm import write_outcome
os.environ["AGL_INSTRUMENT"] = switch
write_outcome(sys.argv[1])
"""


def installed() -> Iterator[Finding]:
    """Check the vLLM of this interpreter, as far as that needs no import of it."""
    missing = missing_vllm()
    if missing:
        text, _, advice = missing.partition("; ")
        yield Finding("vLLM", Mark.PROBLEM, text, advice)
        return
    where = _folder()
    owners = _owners(where)
    if len(owners) > 1:
        yield Finding(
            "vLLM",
            Mark.PROBLEM,
            f"{' and '.join(owners)} are installed over each other in {where}",
            "uninstall them all, and install one",
        )
    else:
        yield Finding("vLLM", Mark.OK, f"{', '.join(owners) or 'of no distribution'}, in {where}")
    yield from _bypasses()


def findings() -> Iterator[Finding]:
    """Import the vLLM of this interpreter as a server would, in another process, and check what became of the patches.

    Takes as long as importing vLLM does, which has to be installed.
    """
    outcome = _probed()
    yield _imported(outcome)
    patches, not_imported = outcome.get("patches", {}), outcome.get("not_imported", {})
    yield from release_findings(outcome.get("version"), patches)
    yield from patch_findings(patches)
    yield from _not_imported(not_imported)
    # All modules to patch have been imported. A set that is still pending was imported without the import hook.
    pending = [name for name, patch in patches.items() if patch["state"] == "pending"]
    if pending and not not_imported:
        yield Finding(
            "vLLM",
            Mark.PROBLEM,
            f"it was imported without our import hook, so these are not patched: {', '.join(pending)}",
            f"see the findings on {PTH} and finders",
        )
    if outcome.get("finders_ahead"):
        yield _finders(outcome["finders_ahead"], all(patch["state"] == "applied" for patch in patches.values()))


def patch_findings(patches: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """Explain the states of the patch sets, here or on a server.

    Args:
        patches: the state and reason of each patch set by its name, as in `Status.as_dict`.
    """
    for name, patch in patches.items():
        state, reason = patch["state"], patch["reason"]
        if state == "pending":
            reason = reason or "not imported in this process; others may have imported it"
        text = f"{state}: {reason}" if reason else f"{state}"
        if state == "failed":
            advice = (
                "use a release that docs/releases.md lists, or a newer agentlightning; until then answers lack this"
            )
            yield Finding(name, Mark.PROBLEM, text, advice)
        else:
            yield Finding(name, Mark.OK if state == "applied" else Mark.NOTE, text)


def release_findings(version: Any, patches: Mapping[str, Mapping[str, str | None]]) -> Iterator[Finding]:
    """Say which patch sets found their targets, if this vLLM is newer than all known releases.

    Args:
        version: that of vLLM; None if unknown.
        patches: as for `patch_findings`.
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
    return Finding(
        "finders", Mark.NOTE, text, "modules that one of these finds cannot be patched: remove it if it finds vLLM"
    )


def _probed() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="agl-doctor-") as folder:
        file = Path(folder, "outcome.json")
        probe = [*interpreter(), "-c", PROBE, str(file)]
        try:
            # Not strict, which would end the process instead of reporting.
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
        last = (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"error": f"importing it ended the process with status {ran.returncode}: {last}"}


def _imported(outcome: Mapping[str, Any]) -> Finding:
    if "error" in outcome:
        return Finding(
            "vLLM",
            Mark.PROBLEM,
            f"it cannot be imported: {outcome['error']}",
            f"see the whole error: {sys.executable} -c 'import vllm'",
        )
    return Finding("vLLM", Mark.OK, f"{outcome['version']} can be imported")


def _folder() -> Path:
    vllm = locate("vllm")
    return Path(vllm.origin if vllm is not None and vllm.origin else "").parent


def _owners(folder: Path) -> list[str]:
    """Return the distributions that installed `folder`. vLLM has several names, and one of them has no files."""
    init = (folder / "__init__.py").resolve()
    return sorted(
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in distributions()
        # Searching a list of files as text takes a hundredth of the time of parsing it.
        if "vllm/__init__.py" in (distribution.read_text("RECORD") or "")
        and any(
            file.parts == ("vllm", "__init__.py") and Path(str(distribution.locate_file(file))).resolve() == init
            for file in distribution.files or ()
        )
    )


def _bypasses() -> Iterator[Finding]:
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
            "VLLM_USE_V1=0 selects the V0 engine of releases up to 0.10, whose answers are not complete",
            "unset it",
        )
