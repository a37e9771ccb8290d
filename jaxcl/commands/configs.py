"""The configurations that come with jaxcl: a list, and a copy to edit."""

from __future__ import annotations

from pathlib import Path

from jaxcl.config.catalogue import headline, shipped
from jaxcl.errors import UserError, nearest


def list_configs() -> str:
    """A line for each configuration that comes with jaxcl: its name and what it is for."""
    known = shipped()
    width = max(map(len, known))
    return "\n".join(f"{name:<{width}}  {headline(path)}" for name, path in known.items())


def copy_config(name: str, destination: Path | None = None) -> Path:
    """Writes a configuration that comes with jaxcl to a file of one's own.

    Args:
      name: its name.
      destination: the file to write, or a folder for `NAME.yaml`; `None`: the current folder.

    Returns:
      The file.

    Raises:
      UserError: there is no configuration of that name, or there is a file already.
    """
    known = shipped()
    if name not in known:
        raise UserError(
            f"--copy {name}: none that comes with jaxcl has this name{nearest(name, known)} `jaxcl configs` lists them",
            exit_code=2,
        )
    path = Path() if destination is None else destination
    path = path / f"{name}.yaml" if path.is_dir() else path
    try:
        with open(path, "xb") as file:
            file.write(known[name].read_bytes())
    except FileExistsError:
        raise UserError(f"{path}: is there already; name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path
