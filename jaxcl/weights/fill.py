"""Reads tensors of a checkpoint into params on devices, without a copy of the model on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxcl.weights.axes import Index, whole
from jaxcl.weights.finite import not_finite
from jaxcl.weights.match import Match
from jaxcl.weights.source import Source


def read_param(source: Source, found: Match, leaf: jax.ShapeDtypeStruct, sharding: Sharding | None) -> Array:
    """One parameter, sharded.

    A stacked parameter is allocated on its devices and filled layer by layer, so that the host holds only one layer of
    it; of a layer that is split over devices, only the parts for this process are read. Experts that have tensors of
    their own are stacked on the host, those of one layer at a time.

    Args:
      source: the checkpoint.
      found: the tensors.
      leaf: shape and dtype of the parameter.
      sharding: its sharding; `None`: the default device, uncommitted.

    Returns:
      The parameter.

    Raises:
      UserError: a tensor holds NaN or infinite values.
    """
    layout = found.row.layout

    def read(name: str, shape: tuple[int, ...], bounds: Index) -> np.ndarray:
        with np.errstate(over="ignore"):  # found below
            value = layout.read(functools.partial(found.read, source, name), shape, bounds).astype(leaf.dtype)
        if not np.isfinite(value).all():
            raise not_finite(source.where, name, str(leaf.dtype))
        return value

    def read_layer(layer: int, bounds: Index) -> np.ndarray:
        place = layer - found.row.first
        if not found.row.by_expert:
            return read(found.names[place], leaf.shape[1:], bounds)
        experts = leaf.shape[1]
        names = found.names[place * experts : (place + 1) * experts]
        return np.stack([read(name, leaf.shape[2:], bounds[1:]) for name in names[bounds[0]]])

    if not found.row.stacked:
        return _own(_place(leaf.shape, sharding, functools.partial(read, found.names[0], leaf.shape)))
    inner, layers = leaf.shape[1:], range(found.row.first, leaf.shape[0])
    if sharding is not None and _without_layers(sharding) is None:
        # The layers axis is split over devices: each part is stacked on the host.
        def stack(bounds: Index) -> np.ndarray:
            lacking = np.zeros([cut.stop - cut.start for cut in bounds[1:]], leaf.dtype)
            chosen = range(leaf.shape[0])[bounds[0]]
            return np.stack([read_layer(layer, bounds[1:]) if layer in layers else lacking for layer in chosen])

        return _own(_place(leaf.shape, sharding, stack))
    array = _zeros(sharding)(leaf.shape, leaf.dtype)
    for layer in layers:
        place = None if sharding is None else _without_layers(sharding)
        array = _set_layer(sharding)(array, _place(inner, place, functools.partial(read_layer, layer)), layer)
    return jax.block_until_ready(array)


def _place(shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Index], np.ndarray]) -> Array:
    """An array made of the parts that `read` returns; each part is read once for all devices with it."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        cuts = whole(shape) if index is None else index
        bounds = tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(cuts, shape, strict=True))
        name = tuple((cut.start, cut.stop) for cut in bounds)
        if name not in parts:
            parts[name] = read(bounds)
        return parts[name]

    array = jax.device_put(part(None)) if sharding is None else jax.make_array_from_callback(shape, sharding, part)
    # Wait for the copy to the devices before the host's memory is reused.
    return jax.block_until_ready(array)


def _own(array: Array) -> Array:
    """The array in memory owned by jax: on the CPU it may share numpy's memory, which a step cannot donate."""
    return jnp.copy(array) if array.platform() == "cpu" else array


def _without_layers(sharding: Sharding) -> Sharding | None:
    """The sharding of one layer of a stacked parameter; `None` if it splits the layers or is of another kind."""
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    if isinstance(sharding, NamedSharding) and not (sharding.spec and sharding.spec[0]):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    return None


# Cached, so that each shape is compiled once.
@functools.cache
def _zeros(sharding: Sharding | None) -> Callable[[tuple[int, ...], np.dtype], Array]:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


@functools.cache
def _set_layer(sharding: Sharding | None) -> Callable[[Array, Array, int], Array]:
    def set_layer(stacked: Array, value: Array, layer: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)
