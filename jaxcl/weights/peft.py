"""Adapters alone, in the format of Hugging Face PEFT."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxcl.errors import UserError
from jaxcl.models.lora import is_adapter
from jaxcl.models.network import Network, Params
from jaxcl.weights.folder import new_folder
from jaxcl.weights.save import DTYPES, checked, param_of, table_of, tensors_of, write_file, write_json
from jaxcl.weights.tables import Table

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
    with new_folder(target, tokenizer_folder) as partial:
        tensors = list(tensors_of(table, adapters))
        write_file(partial / ADAPTER_FILE, tensors, functools.partial(param_of, adapters), dtype)
        if jax.process_index() == 0:
            write_json(partial / CONFIG_FILE, _config(network, table, adapters, base))
    return target


def _config(network: Network, table: Table, paths: Iterable[str], base: str | None) -> dict[str, Any]:
    lora = network.config.lora
    assert lora is not None  # see `save_peft`
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if network.causal else None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _modules(table, {path.rpartition("/")[0] for path in paths}, network.num_layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _modules(table: Table, projections: set[str], layers: int) -> list[str]:
    """Names by which PEFT finds the projections: their last word if it is unique to them, else their full names."""
    kernels = {
        row.path.removesuffix("/kernel"): row.name.removesuffix(".weight")
        for row in table.rows
        if row.path.endswith("/kernel")
    }
    names: set[str] = set()
    for projection in projections:
        word = kernels[projection].rpartition(".")[2]
        namesakes = {path for path, name in kernels.items() if name.rpartition(".")[2] == word}
        whole = {kernels[projection].format(layer=layer) for layer in range(layers)}
        names |= {word} if namesakes <= projections else whole
    return sorted(names)
