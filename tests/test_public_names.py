"""What each package makes public, and that it is documented: the reference of the site is written from it."""

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).parents[1]
PACKAGES = [folder for folder in MAY_IMPORT if (ROOT / "jaxcl" / folder / "__init__.py").is_file()]
_ENTRY = re.compile(r"  \*{0,2}(\w+)(?: \([^)]*\))?:(?: |$)")


class Documented(NamedTuple):
    """A function or class, and the docstring that is shown for it."""

    name: str
    value: Any
    doc: str


def public(folder: str) -> Iterator[tuple[str, Any]]:
    """The names of a package's `__all__`; for a module among them, those that it defines itself."""
    package = importlib.import_module(f"jaxcl.{folder}")
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        yield f"{package.__name__}.{name}", value
        if isinstance(value, types.ModuleType):
            for inner, one in vars(value).items():
                if not inner.startswith("_") and getattr(one, "__module__", "") == value.__name__:
                    yield f"{value.__name__}.{inner}", one


def documented(folder: str) -> Iterator[Documented]:
    """Public functions and classes, and the constructors and public methods that these define."""
    for name, value in public(folder):
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        yield Documented(name, value, inspect.getdoc(value) or "")
        if inspect.isclass(value):
            for inner, member in vars(value).items():
                function = getattr(member, "__func__", member)
                constructor = inner == "__init__" and not getattr(value, "_is_protocol", False)
                shown = constructor or not inner.startswith("_")
                if shown and inspect.isfunction(function) and _is_written(function):
                    doc = inspect.getdoc(function) or ""
                    # The class may explain what it is made from.
                    doc = f"{inspect.getdoc(value)}\n\n{doc}" if constructor else doc
                    yield Documented(f"{name}.{inner}", function, doc)


def _is_written(function: Callable[..., Any]) -> bool:
    """Whether it is in the source, rather than made by a decorator or a base class."""
    return function.__module__.startswith("jaxcl.") and not function.__code__.co_filename.startswith("<")


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls") and name != "_"]


def entries(doc: str, section: str) -> list[str]:
    """The entries of a section of a Google-style docstring."""
    body = re.search(rf"^{section}:\n((?:(?:  .*)?\n)*)", doc + "\n", re.MULTILINE)
    return [match[1] for line in (body[1].splitlines() if body else ()) if (match := _ENTRY.match(line))]


def undocumented(one: Documented) -> list[str]:
    """Parameters that a docstring does not explain.

    With a section Args, all must be in it. Without one, a function of several arguments names them in its text, or says
    where to `see` them.
    """
    names, listed = parameters(one.value), entries(one.doc, "Args")
    if listed or len(names) < 2:
        return [name for name in names if listed and name not in listed]
    if re.search(r"\b[Ss]ee (`|the class)", one.doc):
        return []
    return [name for name in names if not re.search(rf"\b{name}\b", one.doc)]


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_says_what_is_public(folder: str) -> None:
    package = importlib.import_module(f"jaxcl.{folder}")
    assert inspect.getdoc(package)
    assert len(package.__all__) == len(set(package.__all__)) > 0
    assert {name for name in package.__all__ if not hasattr(package, name)} == set()
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("folder", PACKAGES)
def test_public_names_have_docstrings(folder: str) -> None:
    without = [one.name for one in documented(folder) if not one.doc]
    assert without == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_documented_arguments_exist(folder: str) -> None:
    functions = [one for one in documented(folder) if inspect.isfunction(one.value)]
    foreign = {one.name: set(entries(one.doc, "Args")) - set(parameters(one.value)) for one in functions}
    assert {name: names for name, names in foreign.items() if names} == {}


@pytest.mark.parametrize("folder", PACKAGES)
def test_arguments_are_documented(folder: str) -> None:
    functions = [one for one in documented(folder) if inspect.isfunction(one.value)]
    missing = {one.name: undocumented(one) for one in functions}
    assert {name: names for name, names in missing.items() if names} == {}


def test_the_rules_find_what_is_wrong() -> None:
    def function(first: int, second: int) -> None: ...

    def found(doc: str) -> list[str]:
        return undocumented(Documented("function", function, inspect.cleandoc(doc)))

    assert found("Adds.") == ["first", "second"]
    assert found("Adds `first` to `second`.") == []
    assert found("Adds; see `other`.") == []
    assert found("Adds first to second.\n\nArgs:\n  first: a number, with a\n    second line.") == ["second"]
    assert entries("Adds.\n\nArgs:\n  *one: a.\n  two (int): b.\n\nRaises:\n  three: c.", "Args") == ["one", "two"]
