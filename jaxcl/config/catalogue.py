"""The configurations that come with jaxcl, and what the name of a configuration means."""

from __future__ import annotations

import os
from pathlib import Path

from jaxcl.errors import UserError, nearest

_FOLDER = Path(__file__).parent / "shipped"
_SUFFIXES = (".yaml", ".yml")


def shipped() -> dict[str, Path]:
    """The files of the configurations that come with jaxcl, by name.

    >>> "quickstart_das" in shipped()
    True
    """
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file that the name of a configuration means.

    A file at that path comes first. A name without folder or suffix is otherwise that of a configuration that comes
    with jaxcl, unless the current folder holds a changed copy of it (`NAME.yaml`), because either may be meant.

    Args:
      name: a path, or the name of a configuration that comes with jaxcl.

    Returns:
      The file's path. One with a folder or suffix is returned even if there is no file, for the reader to report.

    Raises:
      UserError: the name is that of a configuration that comes with jaxcl and of another file in the current folder,
        or nothing is called so; exit code 2.
    """
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if os.path.dirname(name) or path.suffix in _SUFFIXES:
        if not path.exists() and path.stem in known:
            raise UserError(f"{path}: no such file; {path.stem} comes with jaxcl: give that name alone", exit_code=2)
        return path
    if path.name not in known:
        if path.exists():
            return path
        raise UserError(
            f"{name}: no such file, and no configuration that comes with jaxcl{nearest(path.name, known)} "
            "`jaxcl configs` lists them",
            exit_code=2,
        )
    own = known[path.name]
    for suffix in _SUFFIXES:
        here = Path(f"{name}{suffix}")
        if here.is_file() and here.read_bytes() != own.read_bytes():
            raise UserError(
                f"{name}: which one, {here} in this folder or jaxcl's own? Give {here} or {own}", exit_code=2
            )
    return own


def headline(path: Path) -> str:
    """What a configuration is for: the first line of its file, a comment."""
    with open(path, encoding="utf-8") as file:
        return file.readline().strip("# \n")
