"""Is this package whole, is it ours, and does Python run its `.pth` file?"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath, distributions, entry_points
from pathlib import Path

import agentlightning
from agentlightning.doctor import Finding, Mark

__all__ = ["findings", "interpreter"]

NAME = "agentlightning"
PTH = f"{NAME}.pth"
START = f"{NAME}.start"
START_LINE = "agentlightning._startup:start"
PLUGIN_GROUP = "vllm.general_plugins"
REINSTALL = (
    f"run `{sys.executable} -m pip uninstall {NAME}` until it finds nothing more, then install this package again, "
    "from a checkout or a wheel"
)
# From here on Python ignores the import lines of .pth files; a .start file says the same (PEP 829).
NO_IMPORT_LINES_SINCE = (3, 18)

_IS_ARMED = "import sys; print(any(type(f).__module__ == '_agentlightning' for f in sys.meta_path))"


def findings() -> Iterator[Finding]:
    """All that can be said without a vLLM."""
    installed = _installed()
    yield _package(installed)
    yield from _files_of_others(installed)
    yield from _pth_files(installed)
    yield from _python_too_new(sys.version_info[:2])
    yield from _way_in()


def interpreter() -> list[str]:
    """The command for a Python like this one: what `-S` and the like switch off is off there too."""
    flags = {
        "-I": sys.flags.isolated,
        "-E": sys.flags.ignore_environment,
        "-s": sys.flags.no_user_site,
        "-S": sys.flags.no_site,
    }
    if sys.version_info >= (3, 11):
        # A script does not look into the working directory, which -c and -m would: a clone of vLLM's, for one.
        flags["-P"] = sys.flags.safe_path or sys.modules["__main__"].__spec__ is None
    return [sys.executable, *(flag for flag, is_set in flags.items() if is_set)]


def _installed() -> list[Distribution]:
    """The distributions of our name; an entry of `sys.path` that is there twice counts once."""
    found = {(str(installed.locate_file("")), installed.version): installed for installed in distributions(name=NAME)}
    return list(found.values())


def _package(installed: list[Distribution]) -> Finding:
    folder = Path(agentlightning.__file__).parent
    if not installed:
        return Finding(
            "package",
            Mark.PROBLEM,
            f"{folder} is not installed, it is only on Python's path: there is no {PTH}, and vLLM knows no such plugin",
            f"install it: {sys.executable} -m pip install --no-deps {folder.parent}",
        )
    theirs = [distribution for distribution in installed if not _is_ours(distribution)]
    if theirs:
        return Finding(
            "package",
            Mark.PROBLEM,
            f"another project's package of the same name is installed too: {', '.join(map(_where, theirs))}",
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
    """Where the file is, however its folder is reached. The file itself may be a link: uv can install like that."""
    path = Path(str(distribution.locate_file(file)))
    return path.parent.resolve() / path.name


def _where(distribution: Distribution) -> str:
    return f"{NAME} {distribution.version} in {distribution.locate_file('')}"


def _files_of_others(installed: list[Distribution]) -> Iterator[Finding]:
    """Files in our folder that nobody of ours has put there: the other project's, after a broken uninstall."""
    folder = Path(agentlightning.__file__).parent.resolve()
    recorded = {
        _in_its_folder(distribution, file)
        for distribution in installed
        if _is_ours(distribution)
        for file in distribution.files or ()
    }
    # An editable install records none of them: the folder is the checkout's.
    if folder / "__init__.py" in recorded:
        strangers = sorted(file for file in folder.rglob("*.py") if file not in recorded)
        if strangers:
            shown = ", ".join(str(file.relative_to(folder)) for file in strangers[:3])
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
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
    """Whether a Python like this one is armed by the `.pth`; if not, vLLM may still call us as its plugin."""
    tried = subprocess.run(
        [*interpreter(), "-c", _IS_ARMED],
        env={**os.environ, "AGL_INSTRUMENT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    plugin_problem = _plugin_problem()
    # The last word: what else runs at the start of Python may have said something before.
    if tried.stdout.split()[-1:] == ["True"]:
        yield Finding(PTH, Mark.OK, "it arms every Python of this environment where AGL_INSTRUMENT is on")
        if plugin_problem:
            yield Finding("plugin", Mark.NOTE, f"the second way in is shut, which does no harm: {plugin_problem}")
        return
    reason, advice = _why_not_armed(tried.stderr)
    if plugin_problem is None:
        yield Finding(PTH, Mark.NOTE, f"{reason}; vLLM itself calls us, as its plugin {NAME}")
    else:
        if plugin_problem.startswith("VLLM_PLUGINS"):
            advice = f"unset VLLM_PLUGINS, or have {NAME} among them; or {advice}"
        yield Finding(PTH, Mark.PROBLEM, f"{reason}, and {plugin_problem}", advice)


def _why_not_armed(stderr: str) -> tuple[str, str]:
    """The reason, and what to do about it."""
    if sys.flags.no_site:
        return f"Python runs no {PTH} under -S", "run Python without -S"
    there = [Path(folder, PTH) for folder in _site_folders() if Path(folder, PTH).is_file()]
    if not there:
        return f"there is no {PTH} in {' or '.join(_site_folders())}", REINSTALL
    error = _error_of_ours(stderr)
    return (f"{there[0]} fails: {error}" if error else f"{there[0]} arms nothing"), REINSTALL


def _error_of_ours(stderr: str) -> str | None:
    """The last line of what `site` says of a line of our file that fails; others may have failed as well."""
    for block in stderr.split("Error processing line ")[1:]:
        where, _, traceback = block.partition("Remainder of file ignored")[0].partition("\n")
        if PTH in where and traceback.strip():
            return traceback.strip().splitlines()[-1].strip()
    return next((line for line in stderr.splitlines() if line.startswith(f"{NAME}: ")), None)


def _plugin_problem() -> str | None:
    """Why vLLM does not load our entry point; None where it does."""
    if not any(entry_point.name == NAME for entry_point in entry_points(group=PLUGIN_GROUP)):
        return f"there is no entry point {NAME} in the group {PLUGIN_GROUP}"
    # As vLLM reads it: not set loads every plugin, set and empty loads none.
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {NAME}"
    return None
