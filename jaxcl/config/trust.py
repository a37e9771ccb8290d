"""Which code a configuration names, and whether one that was stored in a run folder may have it run.

The folder may come from elsewhere, with a configuration and modules that its sender wrote.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.config.file import ConfigError
from jaxcl.data.hubs import builder_module
from jaxcl.methods.registry import is_outside


def check_trust(content: Mapping[str, Any], where: str, *, trust: bool) -> None:
    """Refuses a stored configuration that names code outside jaxcl, or imports that code if it is trusted.

    Nothing is imported from the current folder, which may hold the run folder; a folder on `PYTHONPATH` may be it.

    Args:
      content: the configuration as plain values.
      where: where it is stored, for messages.
      trust: whether the user trusts it.

    Raises:
      ConfigError: it names code outside jaxcl and is not trusted, or the code cannot be imported.
    """
    for key, value, module in named_code(content):
        if not trust:
            raise ConfigError(
                f"{where}: {key}: {value} is code outside jaxcl, which a run folder from elsewhere could bring along; "
                "give --trust if you know the run"
            )
        _import(module, f"{where}: {key}: {value}")


def named_code(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, value and module of everything outside jaxcl that a configuration would import.

    >>> list(named_code({"method": {"name": "mine:M"}, "tasks": [{"source": "tfds:a.b/c"}, {"source": "json:d"}]}))
    [('method.name', 'mine:M', 'mine'), ('tasks.0.source', 'tfds:a.b/c', 'a.b.b_dataset_builder')]
    """
    method = content.get("method")
    name = str(method.get("name") if isinstance(method, Mapping) else method)
    if is_outside(name):
        yield "method.name", name, name.partition(":")[0]
    yield from _builders(content, "")


def _builders(node: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """Data sets of TFDS whose builder is a module of its own, or is fetched from a repository (`NAMESPACE:NAME`)."""
    if isinstance(node, Mapping | Sequence) and not isinstance(node, str):
        for part, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _builders(value, f"{key}.{part}".lstrip("."))
    elif isinstance(node, str) and node.startswith("tfds:"):
        name = node.removeprefix("tfds:").partition("/")[0]
        if "." in name:
            yield key, node, builder_module(name)
        elif ":" in name:
            yield key, node, "tensorflow_datasets"


def _import(module: str, where: str) -> None:
    before, here = list(sys.path), os.getcwd()
    wanted = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    sys.path[:] = [path for path in before if Path(path).absolute() != Path(here) or here in wanted]
    try:
        importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be imported: {error}; the current folder is not searched") from None
    finally:
        sys.path[:] = before
