"""The import hook, as seen by the modules that it follows and by other programs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import importlib.util
import inspect
import linecache
import logging
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import _agentlightning
from agentlightning import importhook
from agentlightning.importhook import ImportHook, finders_ahead, when_imported

pytestmark = [pytest.mark.forked, pytest.mark.tier("check")]

SECONDS = 20

Register = Callable[[str, Callable[[ModuleType], object]], ImportHook]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to import from."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def in_threads(*work: Callable[[], object]) -> None:
    """Run all functions concurrently; a deadlock fails the test instead of blocking it."""
    threads = [threading.Thread(target=piece, daemon=True) for piece in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"


def run_with_hooks(*names: str, command: Sequence[str], folder: Path) -> list[str]:
    """Run a Python program that reports the import of each of `names`, and return what it prints."""
    hooks = "".join(f"when_imported({name!r}, lambda module: print('saw', module.__name__))\n" for name in names)
    write(folder, {"sitecustomize.py": f"from agentlightning.importhook import when_imported\n{hooks}"})
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "PYTHON"))}
    result = subprocess.run(
        [sys.executable, *command],
        env=inherited | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def find(name: str) -> ModuleSpec:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return spec


def loader_of(name: str) -> Any:
    return find(name).loader


def load(spec: ModuleSpec) -> ModuleType:
    """Import by hand, as the standard library's documentation shows it."""
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_of_the_hook(folder: Path) -> ModuleType:
    """Import another copy of the package, under its own name."""
    write(folder, {"vendored/__init__.py": ""})
    for place, module in {"_vendored.py": _agentlightning, "vendored/importhook.py": importhook}.items():
        text = Path(module.__file__ or "").read_text()
        write(folder, {place: text.replace("agentlightning", "vendored")})
    return importlib.import_module("vendored.importhook")


def our_finders() -> list[object]:
    """Return our installed finders; every registration adds to these only."""
    return [finder for finder in sys.meta_path if isinstance(finder, _agentlightning.Finder)]


class Finder:
    """Another package's finder, only for the modules in `where`."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self.where = where

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.where:
            return None
        return importlib.util.spec_from_file_location(fullname, self.where[fullname])


class AsksEverybody(Finder):
    """A finder that asks all other finders directly."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.where:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        return next(filter(None, (other.find_spec(fullname, path, target) for other in others)), None)


class AsksImportlib(Finder):
    """A finder that asks for the module as a program would, as wrapt's and vLLM's own do."""

    asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.where or self.asking:
            return None
        self.asking = True
        try:
            return importlib.util.find_spec(fullname)
        finally:
            self.asking = False


class OldLoader:
    """A loader from before `exec_module`."""

    def load_module(self, fullname: str) -> ModuleType:
        module = sys.modules[fullname] = ModuleType(fullname)
        module.__loader__ = self
        return module


class OldLoaderFinder(Finder):
    """A finder that gives its modules an `OldLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, OldLoader()) if fullname in self.where else None  # type: ignore[arg-type]


def test_a_module_is_handed_over_complete_each_time_that_it_is_executed_and_only_then(folder: Path) -> None:
    write(folder, {"hooked.py": "DONE = False\nDONE = True\n"})
    done: list[bool] = []
    when_imported("hooked", lambda module: done.append(module.DONE))
    assert done == []

    importlib.import_module("hooked")
    importlib.import_module("hooked")

    assert done == [True]


def test_a_submodule_is_handed_over_without_its_package(folder: Path) -> None:
    write(folder, {"package/__init__.py": "", "package/hooked.py": "", "package/other.py": ""})
    seen: list[ModuleType] = []
    when_imported("package.hooked", seen.append)

    importlib.import_module("package.other")
    assert seen == []
    module = importlib.import_module("package.hooked")

    assert seen == [module]


def test_a_module_that_is_imported_already_is_handed_over_at_once(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    module = importlib.import_module("hooked")
    seen: list[ModuleType] = []

    when_imported("hooked", seen.append)

    assert seen == [module]


def test_a_reloaded_module_is_handed_over_again(folder: Path) -> None:
    write(folder, {"hooked.py": "LOADER = __loader__\n"})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)
    module = importlib.import_module("hooked")

    importlib.reload(module)

    assert seen == [module, module]
    assert isinstance(module.LOADER, SourceFileLoader)


def test_a_module_imported_before_the_hook_is_handed_over_when_it_is_reloaded(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    module = importlib.import_module("hooked")
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)

    importlib.reload(module)

    assert seen == [module, module]


def test_a_module_that_was_dropped_and_is_imported_again_is_handed_over_again(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)
    first = importlib.import_module("hooked")

    del sys.modules["hooked"]
    second = importlib.import_module("hooked")

    assert first is not second
    assert seen == [first, second]


@pytest.mark.parametrize("already_imported", [False, True])
def test_a_module_that_replaces_itself_hands_over_the_replacement(folder: Path, already_imported: bool) -> None:
    write(folder, {"hooked.py": "import sys\nclass Lazy:\n    pass\nsys.modules[__name__] = Lazy()\n"})
    seen: list[ModuleType] = []
    if already_imported:
        importlib.import_module("hooked")

    when_imported("hooked", seen.append)
    replacement = importlib.import_module("hooked")

    assert type(replacement).__name__ == "Lazy"
    assert seen == [replacement]


def test_each_callback_of_a_module_is_called_in_the_order_of_registration(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    called: list[int] = []
    when_imported("hooked", lambda module: called.append(1))
    when_imported("hooked", lambda module: called.append(2))

    importlib.import_module("hooked")

    assert called == [1, 2]


def test_a_callback_that_is_registered_twice_is_called_once(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    hook = when_imported("hooked", seen.append)

    assert when_imported("hooked", seen.append) is hook
    module = importlib.import_module("hooked")
    assert when_imported("hooked", seen.append) is hook

    assert seen == [module]


def test_a_callback_can_register_another_one_for_the_same_module(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", lambda module: when_imported("hooked", seen.append))

    module = importlib.import_module("hooked")

    assert seen == [module]


def test_a_callback_can_register_one_for_a_module_that_comes_later(folder: Path) -> None:
    write(folder, {"package/__init__.py": "", "package/hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("package", lambda package: when_imported("package.hooked", seen.append))

    module = importlib.import_module("package.hooked")

    assert seen == [module]


def test_a_callback_that_is_registered_halfway_through_a_hooked_import_waits_for_its_end(folder: Path) -> None:
    write(folder, {"hooked.py": "from registry import register\nregister()\nDONE = True\n"})
    done: list[bool] = []
    registry = ModuleType("registry")
    registry.__dict__["register"] = lambda: when_imported("hooked", lambda module: done.append(module.DONE))
    sys.modules["registry"] = registry
    when_imported("hooked", lambda module: None)

    importlib.import_module("hooked")

    assert done == [True]


def test_nothing_is_called_for_a_module_that_is_only_looked_for(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)

    spec = find("hooked")

    assert spec.origin == str(folder / "hooked.py")
    assert "hooked" not in sys.modules
    assert seen == []


def test_a_module_that_a_program_loads_by_its_spec_is_handed_over(folder: Path) -> None:
    write(folder, {"hooked.py": "VALUE = 1\n"})
    values: list[int] = []
    when_imported("hooked", lambda module: values.append(module.VALUE))

    module = load(find("hooked"))

    assert values == [1]
    assert isinstance(module.__loader__, SourceFileLoader)


def test_a_lazily_loaded_module_is_handed_over_when_it_is_used(folder: Path) -> None:
    write(folder, {"hooked.py": "VALUE = 1\n"})
    seen: list[str] = []
    when_imported("hooked", lambda module: seen.append(module.__name__))

    spec = find("hooked")
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = load(spec)
    assert seen == []

    assert module.VALUE == 1
    assert seen == ["hooked"]


@pytest.mark.parametrize("already_imported", [False, True])
def test_a_failing_callback_leaves_the_import_alone(
    folder: Path, already_imported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, {"hooked.py": "VALUE = 1\n"})
    seen: list[ModuleType] = []

    def fail(module: ModuleType) -> None:
        raise RuntimeError("no such method\nin this release")

    if already_imported:
        importlib.import_module("hooked")
    when_imported("hooked", fail)
    when_imported("hooked", seen.append)
    module = importlib.import_module("hooked")

    assert module.VALUE == 1
    assert seen == [module]
    (record,) = caplog.records
    assert (record.name, record.levelno, bool(record.exc_info)) == ("agentlightning", logging.ERROR, False)
    assert "hooked was imported" in record.message
    assert "fail" in record.message
    assert "RuntimeError('no such method\\nin this release')" in record.message


def test_an_error_that_shows_itself_in_several_lines_is_logged_in_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class LongError(Exception):
        def __repr__(self) -> str:
            return "LongError:\n  first\n  second"

    def fail(module: ModuleType) -> None:
        raise LongError

    write(folder, {"hooked.py": ""})
    when_imported("hooked", fail)

    importlib.import_module("hooked")

    (record,) = caplog.records
    assert len(record.message.splitlines()) == 1


def test_a_callback_that_ends_the_program_does_not_block_other_imports(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    module = importlib.import_module("hooked")
    seen: list[ModuleType] = []

    def interrupt(module: ModuleType) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        when_imported("hooked", interrupt)
    with pytest.raises(KeyboardInterrupt):
        importlib.reload(module)
    when_imported("hooked", seen.append)

    assert seen == [module]


def test_a_module_that_fails_to_import_raises_its_own_error_and_is_handed_over_when_it_works(folder: Path) -> None:
    write(folder, {"values.py": "divisor = [0]\n", "hooked.py": "from values import divisor\n1 / divisor[0]\n"})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)

    with pytest.raises(ZeroDivisionError):
        importlib.import_module("hooked")
    assert "hooked" not in sys.modules
    assert seen == []
    importlib.import_module("values").divisor[0] = 1
    module = importlib.import_module("hooked")

    assert seen == [module]


def test_a_module_that_a_program_forbids_stays_forbidden() -> None:
    sys.modules["forbidden"] = None  # type: ignore[assignment]
    seen: list[ModuleType] = []

    when_imported("forbidden", seen.append)

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("forbidden")
    assert seen == []


@pytest.mark.parametrize("name", ["nowhere", "package.nowhere"])
def test_a_hooked_module_that_does_not_exist_raises_the_usual_error(folder: Path, name: str) -> None:
    write(folder, {"package/__init__.py": ""})
    when_imported(name, lambda module: None)

    with pytest.raises(ModuleNotFoundError) as missed:
        importlib.import_module(name)

    assert (missed.value.name, missed.value.msg) == (name, f"No module named '{name}'")
    assert importlib.util.find_spec(name) is None


def test_the_real_loader_is_back_before_the_first_line_of_the_module_runs(folder: Path) -> None:
    write(folder, {"hooked.py": "LOADERS = [__spec__.loader, __loader__]\n"})
    when_imported("hooked", lambda module: module.LOADERS.extend([loader_of("hooked"), module.__loader__]))

    module = importlib.import_module("hooked")

    assert [type(loader) for loader in module.LOADERS] == [SourceFileLoader] * 4
    assert len(set(map(id, module.LOADERS))) == 1


READERS: dict[str, Callable[[], str]] = {
    "importlib.resources": lambda: importlib.resources.files("package").joinpath("data.txt").read_text(),
    "pkgutil": lambda: (pkgutil.get_data("package", "data.txt") or b"").decode(),
    "inspect of a module": lambda: inspect.getsource(importlib.import_module("package")),
    "inspect of a function": lambda: inspect.getsource(importlib.import_module("package").function),
    "linecache": lambda: linecache.getline(inspect.getfile(importlib.import_module("package")), 2),
    "the spec's loader": lambda: loader_of("package").get_source("package"),
}


@pytest.mark.parametrize("already_imported", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_tools_that_read_packages_through_loaders_can_read_a_hooked_one(
    folder: Path, reader: str, already_imported: bool
) -> None:
    write(
        folder, {"package/__init__.py": "def function():\n    return 'to be read'\n", "package/data.txt": "to be read"}
    )
    when_imported("package", lambda module: None)
    if already_imported:
        importlib.import_module("package")

    assert "to be read" in READERS[reader]()


SAYS_WHAT_LOADED_IT = "print(__name__, __spec__.name, type(__spec__.loader).__name__, type(__loader__).__name__)\n"
RUN_MODULE = "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    ("hooked", "run", "printed"),
    [
        ("tool", "tool", ["__main__ tool SourceFileLoader SourceFileLoader"]),
        ("package.tool", "package.tool", ["__main__ package.tool SourceFileLoader SourceFileLoader"]),
        ("package", "package.tool", ["saw package", "__main__ package.tool SourceFileLoader SourceFileLoader"]),
        ("package", "package", ["saw package", "__main__ package.__main__ SourceFileLoader SourceFileLoader"]),
        ("package.__main__", "package", ["__main__ package.__main__ SourceFileLoader SourceFileLoader"]),
    ],
)
@pytest.mark.parametrize("by", ["-m", "runpy"])
def test_a_hooked_module_runs_as_a_program(folder: Path, hooked: str, run: str, printed: list[str], by: str) -> None:
    program = SAYS_WHAT_LOADED_IT
    write(folder, {"tool.py": program, "package/__init__.py": "", "package/tool.py": program})
    write(folder, {"package/__main__.py": program})
    command = ["-m", run] if by == "-m" else ["-c", RUN_MODULE.format(run)]

    assert run_with_hooks(hooked, command=command, folder=folder) == printed


def test_a_module_in_a_zip_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("package/__init__.py", "LOADERS = [type(__spec__.loader), type(__loader__)]\n")
        contents.writestr("package/data.txt", "text")
    monkeypatch.syspath_prepend(archive)
    seen: list[ModuleType] = []
    when_imported("package", seen.append)

    module = importlib.import_module("package")

    assert seen == [module]
    assert [loader.__name__ for loader in module.LOADERS] == ["zipimporter", "zipimporter"]
    assert pkgutil.get_data("package", "data.txt") == b"text"


@pytest.mark.parametrize("name", ["xxsubtype", "__phello__", "_decimal", "colorsys"])
def test_a_module_of_any_kind_is_handed_over_with_its_usual_loader(name: str) -> None:
    plain = importlib.import_module(name)
    loader = plain.__loader__ if isinstance(plain.__loader__, type) else type(plain.__loader__)
    del sys.modules[name]
    seen: list[ModuleType] = []
    when_imported(name, seen.append)

    module = importlib.import_module(name)

    assert seen == [module]
    assert module.__spec__ is not None
    for found in (module.__loader__, module.__spec__.loader):
        assert found is loader or type(found) is loader


def test_a_module_of_an_editable_install_is_handed_over(tmp_path: Path) -> None:
    write(tmp_path, {"src/__init__.py": "LOADER = __loader__\n"})
    # As setuptools does it: a finder behind the path finder, for a folder that is not on the path.
    sys.meta_path.append(Finder({"editable": tmp_path / "src" / "__init__.py"}))
    seen: list[ModuleType] = []
    when_imported("editable", seen.append)

    module = importlib.import_module("editable")

    assert seen == [module]
    assert isinstance(module.LOADER, SourceFileLoader)


def test_a_namespace_package_is_not_hooked_but_its_modules_are(folder: Path) -> None:
    write(folder, {"one/spread/first.py": "", "two/spread/hooked.py": ""})
    sys.path[:0] = [str(folder / "one"), str(folder / "two")]
    seen: list[ModuleType] = []
    when_imported("spread", lambda module: None)
    when_imported("spread.hooked", seen.append)

    module = importlib.import_module("spread.hooked")
    spread = importlib.import_module("spread")

    assert seen == [module]
    assert list(spread.__path__) == [str(folder / "one" / "spread"), str(folder / "two" / "spread")]
    assert type(spread.__loader__).__module__.startswith(("_frozen_importlib", "importlib"))
    assert sorted(entry.name for entry in pkgutil.iter_modules(spread.__path__)) == ["first", "hooked"]


@pytest.mark.filterwarnings("ignore::ImportWarning")
def test_a_module_with_a_loader_without_exec_module_is_not_hooked(tmp_path: Path) -> None:
    sys.meta_path.append(OldLoaderFinder({"old": tmp_path}))
    when_imported("old", lambda module: None)

    module = importlib.import_module("old")

    assert module.__spec__ is not None
    assert isinstance(module.__loader__, OldLoader)
    assert isinstance(module.__spec__.loader, OldLoader)


def test_modules_without_a_hook_stay_unchanged(folder: Path) -> None:
    write(folder, {"hooked.py": "", "other.py": "LOADER = __loader__\n"})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)

    spec = find("other")
    module = importlib.import_module("other")

    assert seen == []
    assert type(spec.loader) is type(module.LOADER) is SourceFileLoader


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [AsksEverybody, AsksImportlib])
def test_finder_that_asks_all_others_works_beside_the_hook(folder: Path, kind: type[Finder], ahead: bool) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)
    sys.meta_path.insert(0 if ahead else 1, kind({"hooked": folder}))

    module = importlib.import_module("hooked")

    assert seen == [module]
    assert isinstance(module.__loader__, SourceFileLoader)


@pytest.mark.parametrize("kind", [None, AsksEverybody, AsksImportlib])
def test_two_copies_of_the_hook_both_see_the_module(folder: Path, kind: type[Finder] | None) -> None:
    write(folder, {"hooked.py": "LOADERS = [__spec__.loader, __loader__]\n"})
    register: Register = copy_of_the_hook(folder).when_imported
    seen: list[str] = []
    when_imported("hooked", lambda module: seen.append("ours"))
    register("hooked", lambda module: seen.append("the copy's"))
    if kind is not None:
        sys.meta_path.append(kind({"hooked": folder}))

    module = importlib.import_module("hooked")

    assert seen == ["ours", "the copy's"]
    assert [type(loader) for loader in module.LOADERS] == [SourceFileLoader, SourceFileLoader]
    assert importlib.reload(module) is module
    assert seen == ["ours", "the copy's"] * 2


def test_finder_that_replaces_loader_methods_works_beside_the_hook(folder: Path) -> None:
    """vLLM's own finder (`vllm.env_override`) does this."""

    class Swaps(AsksImportlib):
        def find_spec(
            self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            spec = super().find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (execute(module), seen.append("swapped"))[0]
            return spec

    write(folder, {"hooked.py": ""})
    seen: list[str] = []
    when_imported("hooked", lambda module: seen.append("ours"))
    sys.meta_path.insert(0, Swaps({"hooked": folder}))

    module = importlib.import_module("hooked")

    assert seen == ["ours", "swapped"]
    assert isinstance(module.__loader__, SourceFileLoader)


def test_finder_ahead_of_the_hook_that_finds_the_module_itself_is_named(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)
    assert finders_ahead() == []
    finder = Finder({"hooked": folder / "hooked.py"})
    sys.meta_path.insert(0, finder)

    importlib.import_module("hooked")

    assert finders_ahead() == [finder]
    assert seen == []


@pytest.mark.parametrize("ahead", [False, True])
def test_every_finder_is_asked_once_with_the_imports_arguments(folder: Path, ahead: bool) -> None:
    write(folder, {"package/__init__.py": "", "package/hooked.py": ""})
    asked: list[tuple[str, list[str] | None, ModuleType | None]] = []

    class Listens(Finder):
        def find_spec(
            self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            asked.append((fullname, None if path is None else list(path), target))
            return None

    when_imported("package.hooked", lambda module: None)
    sys.meta_path.insert(0 if ahead else sys.meta_path.index(PathFinder), Listens({}))

    module = importlib.import_module("package.hooked")
    importlib.reload(module)

    path = [str(folder / "package")]
    assert asked == [("package", None, None), ("package.hooked", path, None), ("package.hooked", path, module)]


def test_a_removed_hook_is_not_called_but_the_others_are(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    removed: list[ModuleType] = []
    kept: list[ModuleType] = []
    hook = when_imported("hooked", removed.append)
    when_imported("hooked", kept.append)

    hook.remove()
    hook.remove()
    module = importlib.import_module("hooked")

    assert removed == []
    assert kept == [module]


def test_a_hook_removed_while_the_module_is_executed_is_not_called(folder: Path) -> None:
    write(folder, {"hooked.py": "from hook import hook\nhook.remove()\n"})
    seen: list[ModuleType] = []
    registered = ModuleType("hook")
    registered.__dict__["hook"] = when_imported("hooked", seen.append)
    sys.modules["hook"] = registered

    module = importlib.import_module("hooked")

    assert seen == []
    assert isinstance(module.__loader__, SourceFileLoader)


def test_a_once_hook_is_called_once(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[str] = []
    when_imported("hooked", lambda module: seen.append(module.__name__), once=True)
    importlib.reload(importlib.import_module("hooked"))

    assert seen == ["hooked"]


def test_a_hook_as_a_context_manager_ends_with_the_block(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []

    with when_imported("hooked", seen.append):
        module = importlib.import_module("hooked")
    importlib.reload(module)

    assert seen == [module]


def test_a_hook_as_a_context_manager_lets_errors_through_and_ends_with_them(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []

    with pytest.raises(ModuleNotFoundError), when_imported("hooked", seen.append):
        importlib.import_module("nowhere")
    importlib.import_module("hooked")

    assert seen == []


def test_a_removed_callback_can_be_registered_again(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append).remove()

    when_imported("hooked", seen.append)
    module = importlib.import_module("hooked")

    assert seen == [module]


def test_the_finder_is_installed_once_and_stays() -> None:
    before = [finder for finder in sys.meta_path if finder not in our_finders()]
    hooks = [when_imported(name, lambda module: None) for name in ("one", "one", "two")]
    assert len(our_finders()) == 1
    assert sys.meta_path[1:] == before

    hooks.pop().remove()
    assert len(our_finders()) == 1

    for hook in hooks * 2:
        hook.remove()
    [finder] = our_finders()
    assert sys.meta_path == [finder, *before]
    assert all(importhook.finder.find_spec(name) is None for name in ("one", "two", "vllm"))


def test_finders_inserted_by_another_thread_meanwhile_stay() -> None:
    inserted = [Finder({}) for _ in range(500)]

    def insert() -> None:
        for finder in inserted:
            sys.meta_path.insert(0, finder)

    thread = threading.Thread(target=insert)
    thread.start()
    while thread.is_alive():
        when_imported("hooked", lambda module: None).remove()
    thread.join()

    assert set(inserted) <= set(sys.meta_path)


@pytest.mark.parametrize("change", ["added", "removed"])
def test_hooks_added_or_removed_during_an_import_hide_no_module(folder: Path, change: str) -> None:
    write(folder, {"other.py": ""})
    hooks = [] if change == "added" else [when_imported("hooked", lambda module: None)]

    class Changes(Finder):
        def find_spec(
            self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            if fullname == "other":
                hooks.pop().remove() if hooks else when_imported("hooked", lambda module: None)
            return None

    sys.meta_path.insert(sys.meta_path.index(PathFinder), Changes({}))

    importlib.import_module("other")


def test_a_package_that_waits_for_a_thread_that_imports_a_hooked_submodule_is_imported(folder: Path) -> None:
    package = """\
import threading

def work():
    from package.hooked import VALUE

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    write(folder, {"package/__init__.py": package, "package/hooked.py": "VALUE = 1\n"})
    values: list[int] = []
    when_imported("package", lambda module: None)
    when_imported("package.hooked", lambda module: values.append(module.VALUE))

    in_threads(lambda: importlib.import_module("package"))

    assert "package" in sys.modules
    assert values == [1]


def test_threads_that_import_a_module_at_once_all_get_it_and_it_is_handed_over_once(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    together = threading.Barrier(8, timeout=SECONDS)
    seen: list[ModuleType] = []
    imported: list[ModuleType] = []
    when_imported("hooked", seen.append)

    def work() -> None:
        together.wait()
        imported.append(importlib.import_module("hooked"))

    in_threads(*[work] * 8)

    assert seen == [sys.modules["hooked"]]
    assert imported == seen * 8


def test_threads_that_import_different_modules_of_a_package_at_once_get_them(folder: Path) -> None:
    names = ["package", "package.first", "package.second", "package.third"]
    write(folder, {f"package/{file}.py": "" for file in ("__init__", "first", "second", "third")})
    together = threading.Barrier(len(names), timeout=SECONDS)
    seen: list[str] = []
    for name in names:
        when_imported(name, lambda module: seen.append(module.__name__))

    def work(name: str) -> None:
        together.wait()
        importlib.import_module(name)

    in_threads(*[lambda name=name: work(name) for name in names])

    assert sorted(seen) == sorted(names)


SLOW = """\
import gate
gate.executed.append(__name__)
gate.started.set()
gate.registered.wait(0.3)
if gate.fails:
    raise ImportError("broken")
DONE = True
"""
GATE = """\
import threading
started, registered = threading.Event(), threading.Event()
executed, fails = [], {fails}
"""


def import_slowly(folder: Path, fails: bool) -> Any:
    """Another thread imports `slow` and is halfway through; returns what steers it.

    It waits a little for `registered`, which a callback that gets half a module sets.
    """
    write(folder, {"slow.py": SLOW, "gate.py": GATE.format(fails=fails)})
    gate: Any = importlib.import_module("gate")

    def work() -> None:
        with contextlib.suppress(ImportError):
            importlib.import_module("slow")

    gate.importer = threading.Thread(target=work, daemon=True)
    gate.importer.start()
    assert gate.started.wait(SECONDS)
    return gate


@pytest.mark.parametrize("hooked_before", [False, True])
def test_a_module_that_another_thread_is_importing_is_handed_over_once_and_complete(
    folder: Path, hooked_before: bool
) -> None:
    if hooked_before:
        when_imported("slow", lambda module: None)
    gate = import_slowly(folder, fails=False)
    done: list[bool] = []

    def note(module: ModuleType) -> None:
        done.append(hasattr(module, "DONE"))
        gate.registered.set()

    in_threads(lambda: when_imported("slow", note))
    gate.importer.join(SECONDS)

    assert done == [True]


@pytest.mark.parametrize("hooked_before", [False, True])
def test_a_module_whose_import_fails_in_another_thread_is_neither_handed_over_nor_imported_again(
    folder: Path, hooked_before: bool
) -> None:
    if hooked_before:
        when_imported("slow", lambda module: None)
    gate = import_slowly(folder, fails=True)
    seen: list[ModuleType] = []

    in_threads(lambda: when_imported("slow", seen.append))
    gate.importer.join(SECONDS)

    assert gate.executed == ["slow"]
    assert seen == []

    gate.fails = False
    module = importlib.import_module("slow")
    assert seen == [module]


def test_a_forked_child_inherits_the_hook(folder: Path) -> None:
    write(folder, {"hooked.py": ""})
    seen: list[ModuleType] = []
    when_imported("hooked", seen.append)

    def work() -> None:
        module = importlib.import_module("hooked")
        sys.exit(0 if seen == [module] else 1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(SECONDS)

    assert child.exitcode == 0
    assert seen == []
