"""Conversion between checkpoint formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.weights.folder import GENERATION_FILE, TOKENIZER_FILES
from jaxcl.weights.load import load_params, read_config, read_token_ids
from jaxcl.weights.locate import locate
from jaxcl.weights.orbax import save_orbax
from jaxcl.weights.peft import save_peft
from jaxcl.weights.save import DTYPES, save_hf, write_json

Format = Literal["hf", "orbax", "peft"]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Format = "hf",
    dtype: str = "float32",
    write_tokenizer: Callable[[Path], None] | None = None,
) -> Path:
    """Reads a checkpoint and writes it in another format.

    Tokenizer files and `generation_config.json` in the source's folder are copied.

    Args:
      source: see `locate`.
      destination: a folder that does not exist yet or is empty.
      format: `hf`: config.json and safetensors, with merged adapters; `orbax`: a folder that loads shard by shard, with
        separate adapters; `peft`: the adapters alone.
      dtype: `float32`, `bfloat16` or, except for `orbax`, `float16`.
      write_tokenizer: called with the finished folder if the source's folder has no tokenizer files (a GGUF file
        contains its tokenizer).

    Returns:
      The folder.

    Raises:
      UserError: the source cannot be read, or the destination cannot be written.
    """
    allowed = ("float32", "bfloat16") if format == "orbax" else DTYPES
    if dtype not in allowed:
        raise UserError(f"dtype={dtype} cannot be written as {format}; allowed are {', '.join(allowed)}", exit_code=2)
    kind, place = locate(source)
    folder = place if place.is_dir() else place.parent
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    config = read_config(source)
    # Kept in float32 until written as float16, whose range is checked per tensor.
    held = "float32" if dtype == "float16" else dtype
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"param_dtype": held})})
    network = Network.create(config)
    # Checkpoints of classifiers have no language-model head; they get a randomly initialised one.
    labels = config.num_labels > 0
    params = load_params(source, network, key=jax.random.key(0) if labels else None, fresh_head=labels)
    # A GGUF file's neighbours belong to it only if they are a tokenizer.
    tokenizer_folder = folder if has_tokenizer or kind != "gguf" else None
    token_ids = read_token_ids(source)
    if format == "orbax":
        target = save_orbax(destination, network, params, tokenizer_folder=tokenizer_folder)
    elif format == "peft":
        target = save_peft(destination, network, params, dtype=dtype, tokenizer_folder=tokenizer_folder)
    else:
        target = save_hf(
            destination,
            network,
            params,
            dtype=dtype,
            tokenizer_folder=tokenizer_folder,
            token_ids=token_ids,
        )
    if not has_tokenizer and write_tokenizer is not None:
        write_tokenizer(target)
    generation = target / GENERATION_FILE
    if format == "orbax" and token_ids and not generation.exists() and jax.process_index() == 0:
        # The other formats keep these ids in their configuration, or with the base model.
        write_json(generation, token_ids)
    return target
