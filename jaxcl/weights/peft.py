"""Adapters alone, in the format of Hugging Face PEFT."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcl.errors import UserError
from jaxcl.models.lora import is_adapter
from jaxcl.models.network import Network, Params
from jaxcl.weights.folder import new_folder
from jaxcl.weights.save import DTYPES, checked, param_of, table_of, tensors_of, write_file, write_json
from jaxcl.weights.tables import Row, Table, adapter_row
from jaxcl.weights.tree import flatten

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def save_peft(
    folder: str | os.PathLike[str],
    network: Network,
    params: Params,
    *,
    base: str | None = None,
    dtype: str = "float32",
    tokenizer_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; `peft.PeftModel.from_pretrained` reads them.

    With several processes, all must call it; process 0 writes.

    Args:
      folder: a folder that does not exist yet or is empty.
      network: a network with adapters.
      params: its params, with any sharding; only adapters are written.
      base: name of the model that the adapters belong to, for the configuration.
      dtype: dtype in the file, `float32`, `bfloat16` or `float16`.
      tokenizer_folder: where tokenizer files are copied from.

    Returns:
      The folder.

    Raises:
      UserError: the network has no adapters; the folder is in use or cannot be written.
      ValueError: the params do not belong to the network, or unknown dtype.
    """
    if network.config.lora is None or network.num_soft_tokens:
        found = "soft tokens" if network.num_soft_tokens else "no adapters (model.lora)"
        formats = "orbax" if network.num_soft_tokens else "hf, orbax"
        raise UserError(f"the model has {found}; allowed formats are {formats}", exit_code=2)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    target = Path(folder).expanduser().absolute()
    table = table_of(network)
    adapters = {path: leaf for path, leaf in checked(network, params).items() if is_adapter(path)}
    held = _as_in_file(network, table, adapters)
    with new_folder(target, tokenizer_folder) as partial:
        tensors = list(tensors_of(held.table, held.adapters))
        write_file(partial / ADAPTER_FILE, tensors, functools.partial(param_of, held.adapters), dtype)
        if jax.process_index() == 0:
            write_json(partial / CONFIG_FILE, _config(network, table, adapters, base, held.parts))
    return target


class _Held(NamedTuple):
    """Adapters as a file has them.

    Attributes:
      table: their names.
      adapters: the params.
      parts: of modules that hold several projections, by name: how many of them have an adapter.
    """

    table: Table
    adapters: Mapping[str, Array]
    parts: Mapping[str, int]


def _as_in_file(network: Network, table: Table, adapters: Mapping[str, Array]) -> _Held:
    """Where a module of the file holds several projections, their adapters are one of all their ranks.

    With factors A and B of each, it has the A one after another, and the B on the diagonal: the sum is the same.
    """
    held: dict[str, Array] = {}
    rows: list[Row] = []
    parts: dict[str, int] = {}
    shapes = flatten(network.unquantised.shapes())
    for path, leaf in adapters.items():
        projection, _, part = path.rpartition("/")
        kernel = table.row(f"{projection}/kernel")
        if not kernel.together:
            held[path] = leaf
            rows.append(table.row(path))
            continue
        every = [one.removesuffix("/kernel") for one in kernel.together]
        adapted = [one for one in every if f"{one}/{part}" in adapters]
        name = kernel.name.removesuffix(".weight").rpartition(".")[2]
        parts[name] = len(adapted)
        if projection != adapted[0]:
            continue  # written with the first
        fused = f"{'+'.join(adapted)}/{part}"
        if part == "lora_a":
            held[fused] = jnp.concatenate([adapters[f"{one}/{part}"] for one in adapted], axis=-1)
        else:
            sizes = [math.prod(shapes[f"{one}/kernel"].shape[2:]) for one in every]
            held[fused] = _on_the_diagonal([adapters.get(f"{one}/{part}") for one in every], sizes)
        rows.append(adapter_row(kernel._replace(text="output input -> input output", together=()), fused, part))
    return _Held(dataclasses.replace(table, rows=(*table.rows, *rows)), held, parts)


def _on_the_diagonal(parts: Sequence[Array | None], sizes: Sequence[int]) -> Array:
    """Of parts `[layers, rank, outputs..]`: `[layers, ranks, all outputs]`, 0 where a part is not."""
    ranks = [0 if part is None else part.shape[1] for part in parts]
    layers = next(len(part) for part in parts if part is not None)
    dtype = next(part.dtype for part in parts if part is not None)
    whole = jnp.zeros((layers, sum(ranks), sum(sizes)), dtype)
    for place, part in enumerate(parts):
        if part is not None:
            at = (0, sum(ranks[:place]), sum(sizes[:place]))
            whole = jax.lax.dynamic_update_slice(whole, part.reshape(layers, ranks[place], sizes[place]), at)
    return whole


def _config(
    network: Network, table: Table, paths: Iterable[str], base: str | None, parts: Mapping[str, int]
) -> dict[str, Any]:
    lora = network.config.lora
    assert lora is not None  # see `save_peft`
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if network.causal else None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # Both by the same number, so that the factor stays.
        "rank_pattern": {name: lora.rank * count for name, count in parts.items() if count > 1},
        "alpha_pattern": {name: lora.alpha * count for name, count in parts.items() if count > 1},
        "lora_dropout": 0.0,
        "target_modules": _modules(table, {path.rpartition("/")[0] for path in paths}, flatten(network.shapes())),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _modules(table: Table, projections: set[str], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Names by which PEFT finds the projections: their last word if it is unique to them, else their full names."""
    kernels = {row.path.removesuffix("/kernel"): row for row in table.rows if row.path.endswith("/kernel")}
    modules = {projection: row.name.removesuffix(".weight") for projection, row in kernels.items()}
    chosen = {modules[projection] for projection in projections}
    names: set[str] = set()
    for projection in projections:
        module = modules[projection]
        word = module.rpartition(".")[2]
        namesakes = {name for name in modules.values() if name.rpartition(".")[2] == word}
        layers = range(shapes[f"{projection}/kernel"].shape[0]) if kernels[projection].stacked else (None,)
        names |= {word} if namesakes <= chosen else {module.format(layer=layer) for layer in layers}
    return sorted(names)
