"""This environment: is the package installed, does Python run its `.pth` file, and what do the variables say?"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath, distributions, entry_points
from pathlib import Path

import agentlightning
from _agentlightning import INSTRUMENT_OFF
from agentlightning import settings
from agentlightning.doctor import Finding, Mark

__all__ = ["PTH", "findings", "interpreter"]

NAME = "agentlightning"
PTH = f"{NAME}.pth"
START = f"{NAME}.start"
START_LINE = "agentlightning._startup:start"
PLUGIN_GROUP = "vllm.general_plugins"
REINSTALL = (
    f"run `{sys.executable} -m pip uninstall {NAME}` until it finds nothing more, then install this package again, "
    "from a checkout or a wheel"
)
# From this version on Python ignores import lines in .pth files; a .start file replaces them (PEP 829).
NO_IMPORT_LINES_SINCE = (3, 18)

_IS_ARMED = "import sys; print(any(type(f).__module__ == '_agentlightning' for f in sys.meta_path))"


def findings() -> Iterator[Finding]:
    """Check all that needs no vLLM."""
    installed = _installed()
    yield _package(installed)
    yield from _files_of_others(installed)
    yield from _pth_files(installed)
    yield from _python_too_new(sys.version_info[:2])
    yield from _way_in()
    yield from _variables()


def interpreter() -> list[str]:
    """Return the command of a Python like this one, with the same flags, such as `-S`."""
    flags = {
        "-I": sys.flags.isolated,
        "-E": sys.flags.ignore_environment,
        "-s": sys.flags.no_user_site,
        "-S": sys.flags.no_site,
    }
    if sys.version_info >= (3, 11):
        # Unlike a script, -c and -m search the working directory, which may be a clone of vLLM.
        flags["-P"] = sys.flags.safe_path or sys.modules["__main__"].__spec__ is None
    return [sys.executable, *(flag for flag, is_set in flags.items() if is_set)]


def _installed() -> list[Distribution]:
    """Return the distributions with our name. One that `sys.path` leads to twice counts once."""
    found = {(str(installed.locate_file("")), installed.version): installed for installed in distributions(name=NAME)}
    return list(found.values())


def _package(installed: list[Distribution]) -> Finding:
    folder = Path(agentlightning.__file__).parent
    if not installed:
        return Finding(
            "package",
            Mark.PROBLEM,
            f"{folder} is only on Python's path, not installed: there is no {PTH}, and no plugin for vLLM",
            f"install it: {sys.executable} -m pip install --no-deps {folder.parent}",
        )
    foreign = [distribution for distribution in installed if not _is_ours(distribution)]
    if foreign:
        return Finding(
            "package",
            Mark.PROBLEM,
            f"another project's package of the same name is installed too: {', '.join(map(_where, foreign))}",
            REINSTALL,
        )
    if len(installed) > 1:
        return Finding(
            "package",
            Mark.PROBLEM,
            f"{NAME} is installed more than once: {', '.join(map(_where, installed))}",
            REINSTALL,
        )
    return Finding("package", Mark.OK, f"{NAME} {installed[0].version}, in {folder}")


def _is_ours(distribution: Distribution) -> bool:
    return any(file.name == PTH for file in distribution.files or ())


def _in_its_folder(distribution: Distribution, file: PackagePath) -> Path:
    """Return the real path of the file's folder, and the file in it. The file may be a link, as uv can install it."""
    path = Path(str(distribution.locate_file(file)))
    return path.parent.resolve() / path.name


def _where(distribution: Distribution) -> str:
    return f"{NAME} {distribution.version} in {distribution.locate_file('')}"


def _files_of_others(installed: list[Distribution]) -> Iterator[Finding]:
    """Find files in our folder that we did not install: those of the other project, after a broken uninstall."""
    folder = Path(agentlightning.__file__).parent.resolve()
    recorded = {
        _in_its_folder(distribution, file)
        for distribution in installed
        if _is_ours(distribution)
        for file in distribution.files or ()
    }
    # An editable installation records none of these files, since the folder is that of the checkout.
    if folder / "__init__.py" in recorded:
        unknown = sorted(file for file in folder.rglob("*.py") if file not in recorded)
        if unknown:
            shown = ", ".join(str(file.relative_to(folder)) for file in unknown[:3])
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            yield Finding(
                "files",
                Mark.PROBLEM,
                f"files of another package lie in {folder}: {shown}{more}",
                f"delete {folder}, and {REINSTALL}",
            )


def _pth_files(installed: list[Distribution]) -> Iterator[Finding]:
    recorded = {
        _in_its_folder(distribution, file)
        for distribution in installed
        for file in distribution.files or ()
        if file.name == PTH
    }
    folders = dict.fromkeys(Path(folder).resolve() for folder in _site_folders())
    for pth in (folder / PTH for folder in folders if (folder / PTH).is_file()):
        if pth not in recorded:
            yield Finding("leftover", Mark.PROBLEM, f"{pth} belongs to no installed package", f"delete {pth}")


def _site_folders() -> list[str]:
    return [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def _python_too_new(version: tuple[int, ...]) -> Iterator[Finding]:
    if version < NO_IMPORT_LINES_SINCE or any(Path(folder, START).is_file() for folder in _site_folders()):
        return
    yield Finding(
        START,
        Mark.PROBLEM,
        f"Python {'.'.join(map(str, version))} ignores the line in {PTH}, and there is no {START}",
        f"write one: echo {START_LINE} > {Path(_site_folders()[0], START)}",
    )


def _way_in() -> Iterator[Finding]:
    """Check that the `.pth` file arms a Python like this one. If not, vLLM may still load us as its plugin."""
    tried = subprocess.run(
        [*interpreter(), "-c", _IS_ARMED],
        env={**os.environ, "AGL_INSTRUMENT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    plugin_problem = _plugin_problem()
    # The last word: other code that runs at the start of Python may have printed something before.
    if tried.stdout.split()[-1:] == ["True"]:
        yield Finding(PTH, Mark.OK, "it arms every Python of this environment where AGL_INSTRUMENT is on")
        if plugin_problem:
            yield Finding(
                "plugin", Mark.NOTE, f"vLLM cannot load us as its plugin, which is not needed here: {plugin_problem}"
            )
        return
    reason, advice = _why_not_armed(tried.stderr)
    if plugin_problem is None:
        yield Finding(PTH, Mark.NOTE, f"{reason}; vLLM itself calls us, as its plugin {NAME}")
    else:
        if plugin_problem.startswith("VLLM_PLUGINS"):
            advice = f"unset VLLM_PLUGINS, or add {NAME} to it; or {advice}"
        yield Finding(PTH, Mark.PROBLEM, f"{reason}, and {plugin_problem}", advice)


def _why_not_armed(stderr: str) -> tuple[str, str]:
    """Return the reason, and what to do about it."""
    if sys.flags.no_site:
        return f"Python runs no {PTH} under -S", "run Python without -S"
    there = [Path(folder, PTH) for folder in _site_folders() if Path(folder, PTH).is_file()]
    if not there:
        return f"there is no {PTH} in {' or '.join(_site_folders())}", REINSTALL
    error = _error_of_ours(stderr)
    return (f"{there[0]} fails: {error}" if error else f"{there[0]} arms nothing"), REINSTALL


def _error_of_ours(stderr: str) -> str | None:
    """Return the error that `site` reports for our file, if any. Files of other packages may have failed as well."""
    for block in stderr.split("Error processing line ")[1:]:
        where, _, traceback = block.partition("Remainder of file ignored")[0].partition("\n")
        if PTH in where and traceback.strip():
            return traceback.strip().splitlines()[-1].strip()
    return next((line for line in stderr.splitlines() if line.startswith(f"{NAME}: ")), None)


def _plugin_problem() -> str | None:
    """Return why vLLM does not load our entry point, or None if it does."""
    if not any(entry_point.name == NAME for entry_point in entry_points(group=PLUGIN_GROUP)):
        return f"there is no entry point {NAME} in the group {PLUGIN_GROUP}"
    # vLLM loads every plugin if the variable is unset, and none if it is set and empty.
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {NAME}"
    return None


def _variables() -> Iterator[Finding]:
    """Check each `AGL_*` variable that is set, and `AGL_INSTRUMENT` in any case."""
    for variable, allowed in settings.VARIABLES.items():
        value, complaint = settings.read(variable), settings.complaint(variable)
        if complaint:
            advice = (
                f"set {variable} to one of these, or unset it" if allowed.values else f"correct or unset {variable}"
            )
            yield Finding(variable, Mark.PROBLEM, complaint, advice)
        elif variable == "AGL_INSTRUMENT" and value in INSTRUMENT_OFF:
            there = f"{value} in this shell" if value else "not set in this shell"
            yield Finding(variable, Mark.NOTE, f"{there}: `vllm serve` needs it, `agl vllm serve` sets it")
        elif variable == "AGL_RECORD_OFFLINE" and settings.read("AGL_STORE"):
            yield _of_offline(settings.record_offline())
        elif variable == "AGL_RETURN_TOKEN_IDS" and value == "none":
            yield Finding(variable, Mark.NOTE, "none: answers carry ids only where a request asks for them")
        # Whether a store can be used is a check of its own.
        elif value and variable != "AGL_STORE":
            yield Finding(variable, Mark.OK, "set" if allowed.secret else settings.without_secrets(value))


def _of_offline(is_on: bool) -> Finding:
    recorded = "what vLLM's LLM generates without a server is"
    if is_on:
        return Finding("AGL_RECORD_OFFLINE", Mark.OK, f"on: {recorded} recorded")
    return Finding("AGL_RECORD_OFFLINE", Mark.NOTE, f"off: {recorded} not recorded")
