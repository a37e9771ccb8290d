"""What each package makes public, and that it is documented: the reference of the site is written from it."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel
from test_architecture import MAY_IMPORT

PACKAGES = [f"jaxcl.{folder}" for folder in MAY_IMPORT]
_ENTRY = re.compile(r"\*{0,2}(\w+)(?: \([^)]*\))?:(?: |$)")


class Public(NamedTuple):
    """A public name and what it stands for."""

    name: str
    value: Any


def public(package: str) -> Iterator[Public]:
    """The names of a package's `__all__`; of a module in it, those that it defines itself."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        yield Public(f"{package}.{name}", value)
        if isinstance(value, types.ModuleType):
            for inner, one in vars(value).items():
                if not inner.startswith("_") and getattr(one, "__module__", "") == value.__name__:
                    yield Public(f"{value.__name__}.{inner}", one)


def callables(one: Public) -> Iterator[tuple[str, Any, str]]:
    """A public function, or a class's constructor and its own public methods: name, function, docstring."""
    if inspect.isfunction(one.value):
        yield one.name, one.value, inspect.getdoc(one.value) or ""
    elif inspect.isclass(one.value):
        own = vars(one.value)
        if inspect.isfunction(own.get("__init__")) and not dataclasses.is_dataclass(one.value):
            doc = f"{inspect.getdoc(one.value) or ''}\n{own['__init__'].__doc__ and inspect.getdoc(own['__init__']) or ''}"
            yield one.name, own["__init__"], doc
        for name, value in own.items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not name.startswith("_") and inspect.isfunction(function):
                yield f"{one.name}.{name}", function, inspect.getdoc(function) or ""


def documented(doc: str, section: str) -> list[str]:
    """The entries of a section of a Google-style docstring."""
    names = []
    for body in re.findall(rf"^{section}:\n((?:(?:  .*)?\n)*)", doc + "\n", re.MULTILINE):
        found = (_ENTRY.match(line[2:]) for line in body.splitlines() if re.match(r"  \S", line))
        names += [match[1] for match in found if match]
    return names
