"""Writes params as a Hugging Face checkpoint that transformers loads. Adapters are merged into their kernels."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxcl.errors import UserError
from jaxcl.models.lora import is_adapter, product
from jaxcl.models.network import Network, Params
from jaxcl.models.quantised import dequantise, scale_path
from jaxcl.models.trainable import ADAPTER_NAMES
from jaxcl.weights.families import family_of
from jaxcl.weights.folder import new_folder
from jaxcl.weights.hf_config import to_hf
from jaxcl.weights.source import INDEX_FILE, SINGLE_FILE
from jaxcl.weights.tables import Row, Table
from jaxcl.weights.tree import flatten

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FILE_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """A tensor of the file, and the parts of the params that it is made from, one after another."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Row, ...]
    layer: int | None
    expert: int | None = None

    def bytes(self, itemsize: int) -> int:
        """Size in the file, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * itemsize


def save_hf(
    folder: str | os.PathLike[str],
    network: Network,
    params: Params,
    *,
    dtype: str | None = None,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Writes `config.json` and safetensors; transformers computes the same logits from them.

    Tensors are written one after another, so that no more than one (of experts: those of a layer) is held on the host;
    adapters are merged into the weights; if these are quantised, into the dequantised ones, which they were trained
    with. With several processes, all must call it; process 0 writes.

    Args:
      folder: a folder that does not exist yet or is empty.
      network: the network.
      params: its params, with any sharding.
      dtype: dtype in the file, `float32`, `bfloat16` or `float16`; default: that of the params.
      tokenizer_folder: where tokenizer files are copied from.
      token_ids: special token ids for `config.json`, by transformers' names (`bos_token_id`, ...).
      file_bytes: largest size of a file; the tensors are split into several files if necessary.

    Returns:
      The folder.

    Raises:
      UserError: the folder is in use or cannot be written; transformers has no such network (one with soft tokens, for
        example); a value exceeds the range of float16.
      ValueError: the params do not belong to the network, or unknown dtype.
    """
    if network.num_soft_tokens:
        raise UserError(
            "the model has soft tokens (model.soft_tokens), which a Hugging Face folder cannot hold; "
            "the allowed format is orbax",
            exit_code=2,
        )
    target = Path(folder).expanduser().absolute()
    flat = checked(network, params)
    shapes = flatten(network.unquantised.shapes())
    base = {path: leaf for path, leaf in shapes.items() if not is_adapter(path)}
    # Other leaves are always float32, or quantised.
    dtype = (
        str(next(leaf for path, leaf in flat.items() if path.startswith("embed/")).dtype) if dtype is None else dtype
    )
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    config = to_hf(network.config, token_ids or {}, dtype)
    divided = _divide(list(tensors_of(table_of(network), base)), dtype, file_bytes)
    with new_folder(target, tokenizer_folder) as partial:
        _write_files(partial, divided, _merging(network, flat), dtype)
        if jax.process_index() == 0:
            write_json(partial / "config.json", config)
    return target


def checked(network: Network, params: Params) -> dict[str, Array]:
    """Params by path.

    Raises:
      ValueError: they do not belong to the network.
    """
    flat = flatten(params)
    found = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(network.shapes()).items()}
    if found != expected:
        path = min(path for path in {*found, *expected} if found.get(path) != expected.get(path))
        raise ValueError(f"params: expected shape {expected.get(path)} at {path}, got {found.get(path)}")
    return flat


def table_of(network: Network) -> Table:
    """The names of a network's params in safetensors files."""
    return family_of(network.config).table


def tensors_of(table: Table, flat: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Iterator[Tensor]:
    """The tensors of a file with these params, given as arrays or as shapes."""
    for path, leaf in flat.items():
        row = table.row(path)
        if not row.stacked:
            yield Tensor(row.name, row.layout.source_shape(leaf.shape), (row,), None)
            continue
        if row.together and path != row.together[0]:
            continue  # written with the first
        rows = tuple(table.row(one) for one in row.together) or (row,)
        parts = [one.layout.source_shape(flat[one.path].shape[one.lead :]) for one in rows]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        for layer in range(row.first, leaf.shape[0]):
            for expert in range(leaf.shape[1]) if row.by_expert else (None,):
                yield Tensor(row.name.format(layer=layer, expert=expert), shape, rows, layer, expert)


Part = Callable[[str, int | None], Array]
"""From a path, and a layer if there is one, to the array that is written for it."""


def param_of(flat: Mapping[str, Array], path: str, layer: int | None) -> Array:
    """A param, or one layer of it, dequantised."""
    if layer is None:
        return flat[path]
    array, scale = _layer(flat[path], layer), flat.get(scale_path(path))
    return array if scale is None else dequantise(array, _layer(scale, layer))


def _merging(network: Network, flat: Mapping[str, Array]) -> Part:
    """Like `param_of`, with adapters merged into their kernels."""
    lora = network.config.lora

    def part(path: str, layer: int | None) -> Array:
        array, projection = param_of(flat, path, layer), path.removesuffix("/kernel")
        if lora is None or f"{projection}/lora_a" not in flat:
            return array
        a, b = (param_of(flat, f"{projection}/{name}", layer) for name in ADAPTER_NAMES)
        return _add(array, a, b, lora.scale)

    return part


def _divide(tensors: list[Tensor], dtype: str, limit: int) -> list[list[Tensor]]:
    """Splits tensors into consecutive parts of at most `limit` bytes (or a single tensor)."""
    itemsize = jnp.dtype(dtype).itemsize
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.bytes(itemsize) > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.bytes(itemsize)
    return parts


def _write_files(folder: Path, parts: list[list[Tensor]], part: Part, dtype: str) -> None:
    if len(parts) == 1:
        write_file(folder / SINGLE_FILE, parts[0], part, dtype)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        total += write_file(folder / name, tensors, part, dtype)
        weight_map |= {tensor.name: name for tensor in tensors}
    if jax.process_index() == 0:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(path: Path, tensors: list[Tensor], part: Part, dtype: str) -> int:
    """Writes a safetensors file tensor by tensor; the safetensors package needs all tensors at once.

    The format: length of the header (8 bytes, little endian), the header (JSON, padded with spaces to a multiple of
    8 bytes), the tensors.

    Args:
      path: the file; process 0 writes it.
      tensors: its tensors.
      part: returns what a tensor is made from.
      dtype: dtype in the file.

    Returns:
      Total bytes of the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    itemsize = jnp.dtype(dtype).itemsize
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes(itemsize)
        header[tensor.name] = {"dtype": DTYPES[dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # All processes take part in gathering; one writes. Experts come one after another: their layer is fetched once.
    experts = functools.lru_cache(maxsize=1)(lambda path, layer: _on_host(part(path, layer)))

    def fetch(row: Row, tensor: Tensor) -> np.ndarray:
        if tensor.expert is None:
            return _on_host(part(row.path, tensor.layer))
        return experts(row.path, tensor.layer)[tensor.expert]

    values = (_whole(tensor, fetch, dtype) for tensor in tensors)
    if jax.process_index() != 0:
        for _ in values:
            pass
        return end
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for value in values:
            file.write(value.reshape(-1).view(np.uint8).data)
    return end


def _whole(tensor: Tensor, fetch: Callable[[Row, Tensor], np.ndarray], dtype: str) -> np.ndarray:
    """One tensor on the host."""
    parts = [_arranged(fetch(row, tensor), row, tensor.name, dtype) for row in tensor.rows]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _on_host(part: Array) -> np.ndarray:
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _arranged(host: np.ndarray, row: Row, name: str, dtype: str) -> np.ndarray:
    """What a tensor is made from, with the file's layout."""
    with np.errstate(over="ignore"):
        value = row.layout.write(host.astype(dtype))
    if dtype == "float16" and np.isinf(value).any() and not np.isinf(host).any():
        raise UserError(f"the tensor {name} holds values beyond float16's largest, 65504; use bfloat16 or float32")
    return value


@jax.jit
def _layer(array: Array, layer: int) -> Array:
    """One layer of a stacked array; compiled once for all layers."""
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


@jax.jit
def _add(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """A kernel plus its adapter, in float32; rounded to the file's dtype only afterwards."""
    return kernel.astype(jnp.float32) + product(a, b, scale)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
