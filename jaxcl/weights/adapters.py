"""Reads adapters from a folder of Hugging Face PEFT."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.lora import LoraConfig, Target, is_adapter, target_of
from jaxcl.models.network import Network, Params
from jaxcl.weights.axes import whole
from jaxcl.weights.families import family_of
from jaxcl.weights.finite import not_finite
from jaxcl.weights.peft import ADAPTER_FILE, CONFIG_FILE
from jaxcl.weights.source import Safetensors, read_json
from jaxcl.weights.tables import ADAPTER_PREFIX, Table
from jaxcl.weights.tree import flatten, unflatten

# Kinds of adapters that are more than a product of two factors, and the value that means: not that kind.
_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False}
_LARGEST = 1e9  # of ranks and factors


def read_lora(folder: str | os.PathLike[str], network: Network) -> LoraConfig:
    """What the adapters of a folder are, as a network needs it to hold them.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      network: the base model's, with or without adapters.

    Returns:
      The kind: all projections that have an adapter, and the largest rank among them.

    Raises:
      UserError: no such folder, adapters of a kind that jaxcl lacks, or of a module that the network lacks.
    """
    place = Path(folder).expanduser()
    content = _config(place)
    table = family_of(network.config).table
    with Safetensors(place / ADAPTER_FILE) as source:
        modules = {name for name in map(_module, source.shapes) if name}
        targets = sorted(map(target_of, _paths(table, modules, str(place), network)))
        ranks = [
            shape[0] for name, shape in source.shapes.items() if name.endswith("lora_A.weight") and len(shape) == 2
        ]
    if not ranks or not min(ranks):
        raise UserError(
            f"{place / ADAPTER_FILE} holds no usable adapters: expected tensors .lora_A.weight [rank, inputs]"
        )
    rank = max(ranks)
    return LoraConfig(rank=rank, alpha=rank * _scale(content, ""), targets=tuple(targets))


def load_peft(folder: str | os.PathLike[str], network: Network) -> Params:
    """Adapters of a folder, for a network that has `read_lora`'s kind of adapters.

    Modules may differ in rank and factor: smaller ranks are filled up with zeros, and factors other than the network's
    go into the second matrix. A module that holds several projections gives each the whole first matrix and its rows of
    the second.

    Args:
      folder: see `read_lora`.
      network: a network with adapters.

    Returns:
      The adapters alone, on the default device; `jaxcl.models.overlay` puts them into the params of the base model.

    Raises:
      UserError: as in `read_lora`; an adapter that the file lacks, or whose shape does not fit.
    """
    place = Path(folder).expanduser()
    content, lora = _config(place), network.config.lora
    if lora is None:
        raise UserError("the model has no adapters (model.lora) to read a PEFT folder into")
    table, shapes = family_of(network.config).table, flatten(network.unquantised.shapes())
    flat: dict[str, Any] = {}
    used: set[str] = set()
    with Safetensors(place / ADAPTER_FILE) as source:
        for path, leaf in shapes.items():
            if not is_adapter(path):
                continue
            row = table.row(path)
            names = [row.name.format(layer=layer) for layer in range(leaf.shape[0] if row.stacked else 1)]
            if lost := [name for name in names if name not in source.shapes]:
                raise UserError(f"{source.where}: the tensor {lost[0]} is missing; see model.lora.targets")
            used.update(names)
            layers = [_layer(source, name, path, table, shapes, content, lora) for name in names]
            flat[path] = jnp.asarray(np.stack(layers) if row.stacked else layers[0], leaf.dtype)
        if extra := sorted(set(source.shapes) - used):
            raise UserError(f"{source.where}: the model has no adapter for the tensor {extra[0]}")
    return unflatten(flat)


def _layer(
    source: Safetensors,
    name: str,
    path: str,
    table: Table,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    content: Mapping[str, Any],
    lora: LoraConfig,
) -> np.ndarray:
    """One layer of one part of an adapter."""
    projection, _, part = path.rpartition("/")
    kernel, layout = table.row(f"{projection}/kernel"), table.row(path).layout
    inner = shapes[path].shape[1:] if kernel.stacked else shapes[path].shape
    if len(source.shapes[name]) != 2:
        raise UserError(f"{source.where}: {name} has shape {list(source.shapes[name])}; expected two axes")
    value = source.read(name, whole(source.shapes[name])).astype(np.float32)
    if not np.isfinite(value).all():
        raise not_finite(source.where, name, "float32")
    if part == "lora_b":
        before = kernel.together[: kernel.together.index(kernel.path)] if kernel.together else ()
        starts = [table.row(one).layout.source_shape(shapes[one].shape[1:])[0] for one in before]
        start, rows = sum(starts), layout.source_shape(inner)[0]
        value = value[start : start + rows] * (_scale(content, _module(name)) / lora.scale)
    axis = 0 if part == "lora_a" else 1
    missing = lora.rank - value.shape[axis]
    if missing > 0:
        value = np.pad(value, [(0, missing if place == axis else 0) for place in range(2)])
    if value.shape != layout.source_shape(inner):
        raise UserError(
            f"{source.where}: the tensor {name} has shape {list(source.shapes[name])}; the model's {path} needs "
            f"{list(layout.source_shape(inner))}"
        )
    return layout.read(lambda index: value[index], inner, whole(inner))


def _config(place: Path) -> dict[str, Any]:
    content = read_json(place / CONFIG_FILE)
    where = place / CONFIG_FILE
    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"{where}: peft_type={kind} is not supported; allowed is LORA")
    for key, allowed in _PLAIN.items():
        if content.get(key, allowed) not in (allowed, []):
            raise UserError(f"{where}: {key}={content[key]} is not supported; allowed is {allowed}")
    numbers = {key: content.get(key) for key in ("r", "lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if not isinstance(found := content.get(pattern) or {}, dict):
            raise UserError(f"{where}: {pattern} is not an object; expected numbers by the names of modules")
        numbers |= {f"{pattern}: {name}": value for name, value in found.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
            raise UserError(f"{where}: {key} is {value!r}; expected a number above 0")
    return content


def _scale(content: Mapping[str, Any], module: str) -> float:
    """The factor on a module's adapter."""

    def of(pattern: str, default: Any) -> Any:
        ends = (value for key, value in (content.get(pattern) or {}).items() if f".{module}".endswith(f".{key}"))
        return next(ends, default)

    rank, alpha = of("rank_pattern", content["r"]), of("alpha_pattern", content["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if content.get("use_rslora") else rank))


def _module(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` from the name of a part of its adapter; empty for other tensors."""
    bare = name.removeprefix(ADAPTER_PREFIX)
    return next((bare.removesuffix(end) for end in (".lora_A.weight", ".lora_B.weight") if bare.endswith(end)), "")


def _paths(table: Table, modules: set[str], where: str, network: Network) -> set[str]:
    """Paths of the projections that modules are."""
    known: dict[str, set[str]] = {}
    shapes = flatten(network.shapes())
    for row in table.rows:
        projection = row.path.removesuffix("/kernel")
        if row.path in shapes and not row.by_expert and target_of(projection) in get_args(Target):
            for layer in range(shapes[row.path].shape[0] if row.stacked else 1):
                name = row.name.format(layer=layer).removesuffix(".weight")
                known.setdefault(name, set()).add(projection)
    if unknown := sorted(modules - set(known)):
        raise UserError(f"{where}: the model has no module {unknown[0]} that could have an adapter")
    return set().union(*(known[module] for module in modules))
