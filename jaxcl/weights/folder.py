"""A folder that is written atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from jaxcl.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
# Copied with them: further chat templates, and the tokens that end a text.
_TEMPLATE_FOLDER = "additional_chat_templates"
GENERATION_FILE = "generation_config.json"
# How images are made ready, in a folder of a model that sees.
IMAGE_FILE = "preprocessor_config.json"
_IMAGE_FILES = (IMAGE_FILE, "processor_config.json")


@contextlib.contextmanager
def new_folder(target: Path, tokenizer_folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Creates a temporary folder and renames it at the end; after an error it is removed.

    All processes must enter; process 0 creates and renames the folder.

    Args:
      target: the final name; must not exist or be an empty folder.
      tokenizer_folder: where tokenizer files are copied from.

    Yields:
      The folder to write into.

    Raises:
      UserError: `target` is in use or cannot be written, or there is no such `tokenizer_folder`.
    """
    if tokenizer_folder is not None and not Path(tokenizer_folder).is_dir():
        raise UserError(f"{tokenizer_folder}: no such folder to copy the tokenizer from")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; name a new folder")
    partial = target.with_name(f".{target.name}.partial")
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _together("jaxcl: folder made")
        yield partial
        _together("jaxcl: folder written")
        if first:
            if tokenizer_folder is not None:
                copy_tokenizer(Path(tokenizer_folder), partial)
            partial.replace(target)
        _together("jaxcl: folder named")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of the tokenizer and the image processor that exist, and `generation_config.json`."""
    for name in (*TOKENIZER_FILES, *_IMAGE_FILES, GENERATION_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, target / _TEMPLATE_FOLDER, copy_function=shutil.copyfile)


def _together(point: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
