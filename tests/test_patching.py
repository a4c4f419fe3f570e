"""Patch sets: checked first, applied completely or not at all, undone in any order."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentlightning.patching import Mismatch, NotForThisRelease, PatchSet, State, Wrap

pytestmark = [pytest.mark.forked, pytest.mark.tier("check")]

SOURCE = '''
class Base:
    def inherited(self, x):
        return f"inherited({x})"

class Serving(Base):
    def greet(self, name, greeting="hello"):
        """Say it."""
        return f"{greeting} {name}"

    async def answer(self, request):
        return request

    @staticmethod
    def static(x):
        return x

    constant = 3
'''


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh module, as a release of a package has it."""
    (tmp_path / "some_serving.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("some_serving")


def laid_on(mark: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that adds its name to the answer."""
    return lambda original: lambda *args, **kwargs: f"{mark}({original(*args, **kwargs)})"


def patch_set(*patches: Any, name: str = "greeting") -> PatchSet:
    return PatchSet(name, ["some_serving"], patches)


def greeting(mark: str = "patched") -> Wrap:
    return Wrap("Serving.greet", ("name",), laid_on(mark))


class Refuses:
    """A patch that passes its check, and then fails to apply."""

    def check(self, module: ModuleType) -> None:
        pass

    def is_applied(self, module: ModuleType) -> bool:
        return False

    def apply(self, module: ModuleType) -> Callable[[], None]:
        raise RuntimeError("no")


class TooNew(Refuses):
    def check(self, module: ModuleType) -> None:
        raise NotForThisRelease("came with 2.0")


def test_a_set_is_pending_until_its_module_is_imported(serving: ModuleType) -> None:
    greetings = patch_set(greeting())
    assert str(greetings.status) == "pending"

    greetings.apply(serving)

    assert str(greetings.status) == "applied"
    assert serving.Serving().greet("you") == "patched(hello you)"


def test_names_imported_before_see_the_patch(serving: ModuleType) -> None:
    taken_earlier, instance = serving.Serving, serving.Serving()

    patch_set(greeting()).apply(serving)

    assert taken_earlier().greet("you") == instance.greet("you") == "patched(hello you)"


def test_a_patched_method_looks_like_the_original(serving: ModuleType) -> None:
    before = inspect.signature(serving.Serving.greet)

    patch_set(greeting(), Wrap("Serving.answer", ("request",), lambda original: original)).apply(serving)

    assert inspect.signature(serving.Serving.greet) == before
    assert (serving.Serving.greet.__name__, serving.Serving.greet.__doc__) == ("greet", "Say it.")
    assert inspect.iscoroutinefunction(serving.Serving.answer)


def test_the_wrapper_of_a_frequent_method_gets_its_arguments_by_position(serving: ModuleType) -> None:
    seen: list[Any] = []

    def keep(original: Callable[..., Any]) -> Callable[..., Any]:
        def keep_and_greet(*args: Any, **kwargs: Any) -> Any:
            seen.append((args[1:], kwargs))
            return original(*args, **kwargs)

        return keep_and_greet

    greetings = patch_set(Wrap("Serving.greet", ("name",), keep, is_frequent=True))
    before = inspect.signature(serving.Serving.greet)
    greetings.apply(serving)

    assert inspect.signature(serving.Serving.greet) == before
    assert serving.Serving().greet(name="you") == serving.Serving().greet("you") == "hello you"
    greetings.undo()
    assert serving.Serving().greet(name="you") == "hello you"
    assert seen == [(("you", "hello"), {})] * 2


def test_frequent_call_through_another_packages_wrapper_keeps_its_defaults(serving: ModuleType) -> None:
    original = serving.Serving.greet

    @functools.wraps(original)
    def traced(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    serving.Serving.greet = traced
    greetings = patch_set(Wrap("Serving.greet", ("name",), lambda greet: greet, is_frequent=True))
    greetings.apply(serving)

    assert serving.Serving().greet(name="you") == serving.Serving().greet("you") == "hello you"
    greetings.undo()
    assert serving.Serving.greet is traced


@pytest.mark.parametrize(
    ("target", "parameters", "reason"),
    [
        ("Serving.gone", (), "some_serving has no Serving.gone"),
        ("Gone.greet", (), "some_serving has no class Gone"),
        ("Serving.greet", ("name", "tone"), "does not take tone"),
        ("Serving.static", (), "is not a method but staticmethod"),
        ("Serving.constant", (), "is not a method but int"),
    ],
)
def test_one_unexpected_target_leaves_the_whole_set_unapplied(
    serving: ModuleType, caplog: pytest.LogCaptureFixture, target: str, parameters: tuple[str, ...], reason: str
) -> None:
    original = serving.Serving.greet
    greetings = patch_set(greeting(), Wrap(target, parameters, laid_on("never")))

    greetings.apply(serving)

    assert serving.Serving.greet is original
    assert greetings.status.state is State.FAILED
    assert greetings.status.reason is not None
    assert reason in greetings.status.reason
    [line] = caplog.messages
    assert "greeting" in line
    assert reason in line


def test_applied_patches_are_undone_when_a_later_one_fails(serving: ModuleType) -> None:
    original = serving.Serving.greet
    greetings = patch_set(greeting(), Refuses())

    greetings.apply(serving)

    assert serving.Serving.greet is original
    assert str(greetings.status) == "failed: RuntimeError('no')"


def test_a_set_for_a_later_release_is_skipped_and_only_the_status_says_so(
    serving: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    greetings = patch_set(greeting(), TooNew())

    greetings.apply(serving)

    assert str(greetings.status) == "not for this release: came with 2.0"
    assert caplog.messages == []


def test_applying_twice_is_a_no_op_with_a_warning(serving: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    greetings = patch_set(greeting())
    greetings.apply(serving)
    greetings.apply(serving)

    assert serving.Serving().greet("you") == "patched(hello you)"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    greetings.undo()
    assert serving.Serving().greet("you") == "hello you"


def test_a_reloaded_module_is_patched_again(serving: ModuleType) -> None:
    greetings = patch_set(greeting())
    greetings.apply(serving)

    greetings.apply(importlib.reload(serving))

    assert serving.Serving().greet("you") == "patched(hello you)"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_sets_on_one_method_are_undone_in_any_order(serving: ModuleType, order: tuple[int, ...]) -> None:
    original = serving.Serving.greet
    sets = [patch_set(greeting(mark), name=mark) for mark in "abc"]
    for patches in sets:
        patches.apply(serving)
    assert serving.Serving().greet("you") == "c(b(a(hello you)))"

    left = ["a", "b", "c"]
    for index in order:
        sets[index].undo()
        left.remove("abc"[index])
        assert serving.Serving().greet("you").count("(") == len(left)
        assert all(f"{mark}(" in serving.Serving().greet("you") for mark in left)
    assert serving.Serving.greet is original
    assert [patches.status.state for patches in sets] == [State.PENDING] * 3


@pytest.mark.parametrize("keeps_attributes", [True, False], ids=["with functools.wraps", "without"])
def test_undo_below_another_packages_wrapper_leaves_that_in_place(serving: ModuleType, keeps_attributes: bool) -> None:
    greetings = patch_set(greeting())
    greetings.apply(serving)
    ours = serving.Serving.greet

    def theirs(self: Any, name: str, greeting: str = "hello") -> str:
        return f"theirs({ours(self, name, greeting)})"

    serving.Serving.greet = functools.update_wrapper(theirs, ours) if keeps_attributes else theirs

    greetings.undo()
    assert serving.Serving().greet("you") == "theirs(hello you)"

    greetings.apply(serving)
    assert serving.Serving().greet("you").count("patched(") == 1
    assert serving.Serving().greet("you").count("theirs(") == 1


def test_an_inherited_method_is_patched_on_its_subclass_and_inherited_again(serving: ModuleType) -> None:
    inherited = patch_set(Wrap("Serving.inherited", ("x",), laid_on("patched")))
    inherited.apply(serving)
    assert serving.Serving().inherited(1) == "patched(inherited(1))"
    assert serving.Base().inherited(1) == "inherited(1)"

    inherited.undo()

    assert "inherited" not in vars(serving.Serving)


def test_undo_is_idempotent_and_leaves_the_set_usable(serving: ModuleType) -> None:
    greetings = patch_set(greeting())
    greetings.undo()
    greetings.apply(serving)
    greetings.undo()
    greetings.undo()
    greetings.apply(serving)

    assert serving.Serving().greet("you") == "patched(hello you)"


def test_a_failed_check_names_the_target_and_the_mismatch(serving: ModuleType) -> None:
    with pytest.raises(Mismatch, match=r"some_serving\.Serving\.greet\(self, name, greeting='hello'\) does not take x"):
        Wrap("Serving.greet", ("x",), laid_on("never")).check(serving)


LAUNCHER = """
async def serve_http(app, sock=None):
    return app

def validate(args):
    return args

class Answers:
    pass
"""
SERVER = """
from some_package.launcher import serve_http as s, validate
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a package, whose functions other modules import by name: one of its own, and one of another's."""
    (tmp_path / "some_package").mkdir()
    for name, text in {"__init__": "", "launcher": LAUNCHER, "server": SERVER, "late": SERVER}.items():
        (tmp_path / "some_package" / f"{name}.py").write_text(text)
    (tmp_path / "some_package_of_another.py").write_text(SERVER)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("some_package.launcher")


def validation(mark: str = "patched") -> PatchSet:
    return PatchSet("validation", ["some_package.launcher"], [Wrap("validate", ("args",), laid_on(mark))])


def served(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper for an asynchronous function."""

    async def patched(app: Any, *args: Any) -> Any:
        return f"patched({await original(app, *args)})"

    return patched


def serving_http() -> PatchSet:
    return PatchSet("serving", ["some_package.launcher"], [Wrap("serve_http", ("app",), served)])


def test_modules_of_the_package_that_imported_a_function_before_see_the_patch(launcher: ModuleType) -> None:
    server = importlib.import_module("some_package.server")
    original = launcher.serve_http
    serving = serving_http()

    serving.apply(launcher)
    assert launcher.serve_http is server.s is not original
    assert asyncio.run(server.s("app")) == "patched(app)"

    serving.undo()
    assert launcher.serve_http is server.s is original


def test_a_main_program_that_imported_a_function_before_sees_the_patch(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    vars(main)["check"] = original = launcher.validate
    monkeypatch.setitem(sys.modules, "__main__", main)
    validations = validation()

    validations.apply(launcher)
    assert vars(main)["check"]("x") == "patched(x)"

    validations.undo()
    assert vars(main)["check"] is original


def test_modules_of_other_packages_keep_the_function_that_they_imported(launcher: ModuleType) -> None:
    other = importlib.import_module("some_package_of_another")
    original = other.validate
    validations = validation()

    validations.apply(launcher)

    assert other.validate is original
    assert launcher.validate is not original


def test_a_module_that_imports_a_patched_function_gets_the_original_at_undo(launcher: ModuleType) -> None:
    original = launcher.validate
    validations = validation()
    validations.apply(launcher)
    late = importlib.import_module("some_package.late")
    assert late.validate("x") == "patched(x)"

    validations.undo()

    assert late.validate is launcher.validate is original


def test_a_patched_function_kept_after_undo_behaves_as_the_original(launcher: ModuleType) -> None:
    validations = validation()
    validations.apply(launcher)
    kept = launcher.validate

    validations.undo()

    assert kept("x") == "x"


def test_a_patched_function_looks_like_the_original(launcher: ModuleType) -> None:
    before = inspect.signature(launcher.serve_http)

    serving_http().apply(launcher)

    assert inspect.signature(launcher.serve_http) == before
    assert inspect.iscoroutinefunction(launcher.serve_http)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_sets_on_one_function_are_undone_in_any_order(launcher: ModuleType, order: tuple[int, ...]) -> None:
    server = importlib.import_module("some_package.server")
    original = launcher.validate
    sets = [validation(mark) for mark in "ab"]
    for patches in sets:
        patches.apply(launcher)
    assert server.validate("x") == "b(a(x))"

    sets[order[0]].undo()
    assert server.validate("x") == f"{'ab'[order[1]]}(x)"

    sets[order[1]].undo()
    assert server.validate is launcher.validate is original


@pytest.mark.parametrize(
    ("target", "parameters", "reason"),
    [
        ("gone", (), r"some_package\.launcher has no gone"),
        ("validate", ("request",), r"some_package\.launcher\.validate\(args\) does not take request"),
        ("Answers", (), r"some_package\.launcher\.Answers is not a function but type"),
        ("__name__", (), r"some_package\.launcher\.__name__ is not a function but str"),
    ],
)
def test_an_unexpected_function_is_named(
    launcher: ModuleType, target: str, parameters: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(Mismatch, match=reason):
        Wrap(target, parameters, laid_on("never")).check(launcher)
