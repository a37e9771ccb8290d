"""Methods by name. A method is imported when it is asked for, and only that one."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from jaxcl.errors import nearest
from jaxcl.methods.base import Method

METHODS: dict[str, str] = {
    "sequential": "jaxcl.methods.sequential:Sequential",
    "one": "jaxcl.methods.one:One",
    "joint": "jaxcl.methods.joint:Joint",
    "ewc": "jaxcl.methods.ewc:Ewc",
    "lwf": "jaxcl.methods.lwf:Lwf",
    "sdft": "jaxcl.methods.sdft:Sdft",
    "replay": "jaxcl.methods.replay:Replay",
    "derpp": "jaxcl.methods.derpp:Derpp",
    "das": "jaxcl.methods.das:Das",
    "das_paper": "jaxcl.methods.das_paper:DasPaper",
    "seekr": "jaxcl.methods.seekr:Seekr",
    "agem": "jaxcl.methods.agem:Agem",
    "mofo": "jaxcl.methods.mofo:Mofo",
    "osft": "jaxcl.methods.osft:Osft",
    "ssu": "jaxcl.methods.ssu:Ssu",
    "olora": "jaxcl.methods.olora:Olora",
    "progressive_prompts": "jaxcl.methods.progressive_prompts:ProgressivePrompts",
}
"""`module:Class` of each method, by the name that a configuration gives it."""


def find_method(name: str) -> type[Method]:
    """The method with a registered name, or the class that `module:Class` names.

    >>> find_method("sequential").__name__
    'Sequential'

    Raises:
      ValueError: the name is unknown; the message suggests the nearest one.
    """
    if ":" not in name and name not in METHODS:
        raise ValueError(f"no method {name!r}{nearest(name, METHODS)} allowed: {', '.join(METHODS)}, or module:Class")
    module, _, attribute = METHODS.get(name, name).partition(":")
    try:
        found = getattr(_import(module, outside=is_outside(name)), attribute)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative name
        raise ValueError(f"cannot load {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name!r} is not a jaxcl.methods.Method")
    return found


def is_outside(name: str) -> bool:
    """Whether a method's name leads to code that is not jaxcl's.

    >>> is_outside("das"), is_outside("jaxcl.methods.das:Das"), is_outside("mine:Method")
    (False, False, True)
    """
    return ":" in name and not name.startswith("jaxcl.")


def _import(module: str, outside: bool) -> Any:
    """A module; one outside jaxcl is installed, on `PYTHONPATH`, or a file in the current folder."""
    here = os.getcwd()
    if outside and module not in sys.modules and here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)
