"""A package's modules as their source has them: classes, methods and parameters, without importing any of it.

`Source.module(name)` gives a module of stubs: each function takes what the source says and does nothing, each class has
the bases and the methods that it has there, and pydantic models have their fields. What a decorator or a metaclass
makes of them when they are imported does not show.
"""

from __future__ import annotations

import ast
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

__all__ = ["Source"]

KEPT_DECORATORS = ("staticmethod", "classmethod", "property")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """The Python files of a zip file, such as a wheel."""

    def __init__(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as files:
            self._texts = {_module_name(file): files.read(file) for file in files.namelist() if file.endswith(".py")}
        self._trees: dict[str, ast.Module] = {}
        self._modules: dict[str, ModuleType] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._texts

    def below(self, package: str) -> Iterator[str]:
        """The modules of a package, and of the packages in it."""
        return (name for name in self._texts if name == package or name.startswith(f"{package}."))

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self._texts[module])
        return self._trees[module]

    def defining(self, name: str) -> list[str]:
        """The modules that define a class or a function of this name."""
        definition = re.compile(rb"^\s*(?:class|def|async def) %s\b" % name.encode(), re.MULTILINE)
        candidates = [module for module, text in self._texts.items() if definition.search(text)]
        return [module for module in candidates if _definition(self.tree(module).body, name) is not None]

    def with_method(self, name: str, package: str) -> list[str]:
        """The classes below a package that have a method of this name: `module.Class`."""
        definition = re.compile(rb"^\s+(?:async )?def %s\b" % name.encode(), re.MULTILINE)
        return [
            f"{module}.{node.name}"
            for module in self.below(package)
            if definition.search(self._texts[module])
            for node in ast.walk(self.tree(module))
            if isinstance(node, ast.ClassDef) and _definition(node.body, name) is not None
        ]

    def module(self, name: str) -> ModuleType:
        """The stubs of a module; those that it imports are made when they are asked for."""
        if name not in self._modules:
            self._modules[name] = _Module(self, name)
        return self._modules[name]

    @cached_property
    def packages(self) -> frozenset[str]:
        """The names of all packages."""
        return frozenset(name.rpartition(".")[0] for name in self._texts)


class _Module(ModuleType):
    def __init__(self, source: Source, name: str) -> None:
        super().__init__(name)
        self._source = source

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("__") else self._find(name)
        if found is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        setattr(self, name, found)
        return found

    def _find(self, name: str) -> Any:
        statements = list(_statements(self._source.tree(self.__name__).body))
        for statement in statements:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self._class(statement)
        functions = [statement for statement in statements if isinstance(statement, Function)]
        # The last one holds: overloads come before it.
        for statement in reversed(functions):
            if statement.name == name:
                return _function(statement)
        for statement in statements:
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(statement, alias.name)
            elif (
                isinstance(statement, ast.Assign)
                and isinstance(statement.value, ast.Name)
                and any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)
            ):
                return getattr(self, statement.value.id, None)
        return None

    def _imported(self, statement: ast.ImportFrom, name: str) -> Any:
        module = statement.module or ""
        if statement.level:
            # Relative to the package, which a package's own module is in itself.
            package = self.__name__.split(".")
            above = statement.level - (self.__name__ in self._source.packages)
            module = ".".join([*package[: len(package) - above], *filter(None, [module])])
        if module == "pydantic" and name == "BaseModel":
            return BaseModel
        return getattr(self._source.module(module), name, None) if module in self._source else None

    def _class(self, definition: ast.ClassDef) -> type:
        known = [getattr(self, base.id, None) for base in definition.bases if isinstance(base, ast.Name)]
        bases = [base for base in known if isinstance(base, type)]
        contents: dict[str, Any] = {"__module__": self.__name__, "__qualname__": definition.name}
        if any(issubclass(base, BaseModel) for base in bases):
            fields = [name for name in _fields(definition) if not hasattr(BaseModel, name)]
            contents |= {"__annotations__": dict.fromkeys(fields, Any), **dict.fromkeys(fields)}
        else:
            # The last one holds, as above.
            functions = [statement for statement in _statements(definition.body) if isinstance(statement, Function)]
            contents |= {function.name: _function(function) for function in functions}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return types.new_class(
                definition.name, tuple(bases), exec_body=lambda namespace: namespace.update(contents)
            )


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, also those below `if` and `try`, whichever way these would go."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _statements(statement.body)
            yield from _statements(getattr(statement, "orelse", ()))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


def _definition(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    found = (node for node in _statements(body) if isinstance(node, ast.ClassDef | Function) and node.name == name)
    return next(found, None)


def _fields(definition: ast.ClassDef) -> Iterator[str]:
    """Yield the fields of a pydantic model."""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if not name.startswith("_") and name != "model_config" and "ClassVar" not in ast.dump(statement.annotation):
                yield name


def _function(definition: Function) -> Any:
    """A function with the same parameters, that does nothing."""
    stub = ast.parse(f"def {definition.name}(): pass").body[0]
    assert isinstance(stub, ast.FunctionDef)
    given = definition.args
    # Defaults only say that there is one, and annotations nothing.
    nothing = ast.Constant(None)
    stub.args = ast.arguments(
        posonlyargs=[ast.arg(parameter.arg) for parameter in given.posonlyargs],
        args=[ast.arg(parameter.arg) for parameter in given.args],
        vararg=ast.arg(given.vararg.arg) if given.vararg else None,
        kwonlyargs=[ast.arg(parameter.arg) for parameter in given.kwonlyargs],
        kw_defaults=[None if default is None else nothing for default in given.kw_defaults],
        kwarg=ast.arg(given.kwarg.arg) if given.kwarg else None,
        defaults=[nothing] * len(given.defaults),
    )
    names = [decorator.id for decorator in definition.decorator_list if isinstance(decorator, ast.Name)]
    stub.decorator_list = [ast.Name(name, ast.Load()) for name in names if name in KEPT_DECORATORS]
    namespace: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), "<stub>", "exec"), namespace)
    return namespace[definition.name]
