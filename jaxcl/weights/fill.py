"""Reads tensors of a checkpoint into params on devices, without a copy of the model on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxcl.models.quantised import Quantise, Quantised, quantise, scale_path
from jaxcl.weights.axes import Index, whole
from jaxcl.weights.finite import not_finite
from jaxcl.weights.match import Match
from jaxcl.weights.source import Source


class Held(NamedTuple):
    """How a network holds its params, by path.

    Attributes:
      shapes: their shapes and dtypes, those of quantised kernels' codes and scales among them.
      places: their shardings; `None`: the default device, uncommitted.
      how: how kernels are quantised.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    places: Mapping[str, Sharding | None]
    how: Quantise

    def quantises(self, path: str) -> bool:
        """Whether a param is a kernel that is quantised."""
        return scale_path(path) in self.shapes

    def quantised(self, path: str, kernel: Array) -> dict[str, Array]:
        """The codes and scales of a stacked kernel, quantised as a whole on its devices, by path."""
        names = path, scale_path(path)
        run = _quantise(self.shapes[names[1]].shape, self.how, *(self.places[name] for name in names))
        return dict(zip(names, jax.block_until_ready(run(kernel)), strict=True))


def read_quantised(source: Source, found: Match, leaf: jax.ShapeDtypeStruct, held: Held) -> dict[str, Array]:
    """One kernel, quantised layer by layer on its devices; see `read_param`.

    Args:
      source: the checkpoint.
      found: the tensors.
      leaf: shape of the kernel, and the dtype that it is quantised from.
      held: how the network holds it.

    Returns:
      Codes and scales, by path.

    Raises:
      UserError: a tensor holds NaN or infinite values.
    """
    names = found.row.path, scale_path(found.row.path)
    places = [held.places[name] for name in names]
    one_layer = [None if place is None else _without_layers(place) for place in places]
    if places[0] is not None and one_layer[0] is None:
        return held.quantised(found.row.path, read_param(source, found, leaf, places[0]))
    run = _quantise(held.shapes[names[1]].shape[1:], held.how, *one_layer)
    arrays = [
        _zeros(place)(held.shapes[name].shape, held.shapes[name].dtype)
        for name, place in zip(names, places, strict=True)
    ]
    for layer, value in _layers(_reader(source, found, leaf), found, leaf.shape, places[0]):
        parts = zip(arrays, run(value), places, strict=True)
        arrays = [_set_layer(place)(array, part, layer) for array, part, place in parts]
        jax.block_until_ready(arrays)  # before the next layer comes to the devices
    return dict(zip(names, arrays, strict=True))


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
    read = _reader(source, found, leaf)
    if not found.row.stacked:
        return _own(_place(leaf.shape, sharding, functools.partial(read, found.names[0], leaf.shape)))
    if sharding is not None and _without_layers(sharding) is None:
        # The layers axis is split over devices: each part is stacked on the host.
        def stack(bounds: Index) -> np.ndarray:
            lacking = np.zeros([cut.stop - cut.start for cut in bounds[1:]], leaf.dtype)
            chosen, part = range(leaf.shape[0])[bounds[0]], _of_layer(read, found, leaf.shape[1:])
            first = found.row.first
            return np.stack([part(layer, bounds[1:]) if layer >= first else lacking for layer in chosen])

        return _own(_place(leaf.shape, sharding, stack))
    array = _zeros(sharding)(leaf.shape, leaf.dtype)
    for layer, value in _layers(read, found, leaf.shape, sharding):
        array = _set_layer(sharding)(array, value, layer)
    return jax.block_until_ready(array)


_Read = Callable[[str, tuple[int, ...], Index], np.ndarray]


def _reader(source: Source, found: Match, leaf: jax.ShapeDtypeStruct) -> _Read:
    """Reads a part of a tensor in the layout and dtype of the parameter."""
    layout = found.row.layout

    def read(name: str, shape: tuple[int, ...], bounds: Index) -> np.ndarray:
        with np.errstate(over="ignore"):  # found below
            value = layout.read(functools.partial(found.read, source, name), shape, bounds).astype(leaf.dtype)
        if not np.isfinite(value).all():
            raise not_finite(source.where, name, str(leaf.dtype))
        return value

    return read


def _of_layer(read: _Read, found: Match, inner: tuple[int, ...]) -> Callable[[int, Index], np.ndarray]:
    """Reads a part of a layer of a stacked parameter, from one tensor or one per expert."""

    def part(layer: int, bounds: Index) -> np.ndarray:
        place = layer - found.row.first
        if not found.row.by_expert:
            return read(found.names[place], inner, bounds)
        names = found.names[place * inner[0] : (place + 1) * inner[0]]
        return np.stack([read(name, inner[1:], bounds[1:]) for name in names[bounds[0]]])

    return part


def _layers(
    read: _Read, found: Match, shape: tuple[int, ...], sharding: Sharding | None
) -> Iterator[tuple[int, Array]]:
    """The layers that a stacked parameter with this sharding has tensors for, one after another, with their numbers."""
    place, part = None if sharding is None else _without_layers(sharding), _of_layer(read, found, shape[1:])
    for layer in range(found.row.first, shape[0]):
        yield layer, _place(shape[1:], place, functools.partial(part, layer))


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


@functools.cache
def _quantise(
    scale_shape: tuple[int, ...], how: Quantise, codes: Sharding | None, scale: Sharding | None
) -> Callable[[Array], Quantised]:
    run = functools.partial(quantise, scale_shape=scale_shape, how=how)
    return jax.jit(run, out_shardings=None if codes is None else Quantised(codes, scale))
