"""The small modules that all architectures are made of. Inside a scan they hold one layer, outside all of them.

Every parameter is an `nnx.Param` whose metadata say what it is: `axes` names its logical axes, `unit` the unit it
belongs to (`jaxcl.functional.Unit`). A module that is repeated in every layer is built with `layers=n`: its parameters
then have a leading `layers` axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from jaxcl.functional.row_column import Sides
from jaxcl.functional.soft_masks import LAYER, Unit
from jaxcl.models.compute import Compute, recomputed
from jaxcl.models.lora import LoraConfig, initial_std
from jaxcl.models.product import product
from jaxcl.models.quantised import Quantise, quantise, quantised_product, quantised_shapes

Sizes = dict[str, int]

_DRAWN_FLAT = 2**22


UNIT_AXES = {
    "heads": ("heads", "kv_heads"),
    "intermediate": ("mlp", "experts", "expert_mlp"),
    "output": ("embed",),
}
"""Logical axes that run along the units of a kind; key/value heads serve groups of heads, units of experts have two."""


def parameter(
    key: Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    std: float,
    compute: Compute,
    layers: int | None,
    unit: str | None = None,
    inputs: int = 0,
    stacked: int = 0,
) -> nnx.Param[Array]:
    """A parameter drawn from a normal distribution.

    Args:
      key: what it is drawn from.
      shape: its shape within a layer.
      axes: logical names of these axes.
      std: standard deviation.
      compute: gives the dtype.
      layers: repeats it along a leading `layers` axis; `None` outside layers.
      unit: kind of unit that it belongs to, if one of its axes runs along such units; a key of `UNIT_AXES`.
      inputs: of a matrix, how many of these axes are its inputs, from the first; the others are its outputs.
      stacked: how many of these axes, before its inputs, run along matrices that are stacked, such as those of experts.
    """
    own, sides = _unit(axes, layers, unit), _sides(len(shape), layers, inputs, stacked)
    lead, lead_axes = ((), ()) if layers is None else ((layers,), ("layers",))
    shape, axes = (*lead, *shape), (*lead_axes, *axes)
    # Drawing in one dimension compiles several times faster, and draws the same; in its own shape, a large
    # parameter can be drawn by the devices that will hold its parts.
    size = math.prod(shape)
    drawn = (size,) if size <= _DRAWN_FLAT else shape
    value = jax.random.normal(key, drawn, compute.parameter_dtype).reshape(shape)
    return nnx.Param(std * value, axes=axes, unit=own, sides=sides)


def constant(
    value: float,
    shape: Sequence[int],
    axes: Sequence[str | None],
    compute: Compute,
    layers: int | None,
    unit: str | None = None,
    inputs: int = 0,
) -> nnx.Param[Array]:
    """A parameter that starts at one value everywhere; see `parameter`."""
    own, sides = _unit(axes, layers, unit), _sides(len(shape), layers, inputs)
    lead, lead_axes = ((), ()) if layers is None else ((layers,), ("layers",))
    start = jnp.full((*lead, *shape), value, compute.parameter_dtype)
    return nnx.Param(start, axes=(*lead_axes, *axes), unit=own, sides=sides)


def _sides(dimensions: int, layers: int | None, inputs: int, stacked: int = 0) -> Sides:
    """The sides of a parameter with this number of axes within a layer: stacked ones, inputs, outputs."""
    axes = tuple(range(dimensions) if layers is None else range(1, dimensions + 1))[stacked:]
    return Sides(axes[:inputs], axes[inputs:]) if inputs else Sides(axes, ())


def _unit(axes: Sequence[str | None], layers: int | None, kind: str | None) -> Unit | None:
    """The unit of a parameter with these axes within a layer; `None` outside layers."""
    if layers is None:
        return None
    found = tuple(axis for axis, name in enumerate(axes, 1) if kind is not None and name in UNIT_AXES[kind])
    if kind is None or not found:
        return Unit(LAYER, 0)
    return Unit(kind, found[0] if len(found) == 1 else found)


class Linear(nnx.Module):
    """A matrix product over the leading `inputs` axes of its kernel, an optional bias and an optional adapter.

    Args:
      inputs: sizes by axis name that are summed over, the last dimensions of the argument.
      outputs: sizes by axis name that take their place.
      bias: whether to add a bias of the shape of `outputs`.
      std: standard deviation of the initial kernel.
      kernel_axes: logical axes of the kernel where they differ from the names in `inputs` and `outputs`.
      unit: kind of unit that the parameters belong to which have its axis; see `parameter`.
      lora: adds an adapter of this kind; calls use it, `in_float32` does not.
      quantised: how the kernel is held, which is then a constant of the layer.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: Sizes,
        outputs: Sizes,
        *,
        bias: bool,
        std: float,
        compute: Compute,
        layers: int | None = None,
        kernel_axes: Sequence[str | None] | None = None,
        unit: str | None = None,
        lora: LoraConfig | None = None,
        quantised: Quantise = "none",
    ) -> None:
        axes = (*inputs, *outputs) if kernel_axes is None else tuple(kernel_axes)
        shape = (*inputs.values(), *outputs.values())
        kernel = parameter(rngs.params(), shape, axes, std, compute, layers, unit, len(inputs))
        self.kernel, self.kernel_scale = _quantised(kernel, len(inputs), quantised)
        width, width_axes = tuple(outputs.values()), axes[len(inputs) :]
        self.bias = constant(0.0, width, width_axes, compute, layers, unit) if bias else None
        self.contracted = len(inputs)
        self.dtype = compute.dtype
        if lora is None:
            self.lora_a, self.lora_b, self.lora_scale = None, None, 1.0
            return
        wide = compute.model_copy(update={"param_dtype": "float32"})
        a_shape, b_shape = (*shape[: len(inputs)], lora.rank), (lora.rank, *shape[len(inputs) :])
        a_axes, b_axes = (*axes[: len(inputs)], "rank"), ("rank", *axes[len(inputs) :])
        # Drawn from a stream of their own: the rest of the network is the same with and without adapters.
        std = initial_std(a_shape[:-1])
        self.lora_a = parameter(rngs.lora(), a_shape, a_axes, std, wide, layers, unit, len(inputs))
        self.lora_b = constant(0.0, b_shape, b_axes, wide, layers, unit, 1)
        self.lora_scale = lora.scale

    def __call__(self, x: Array) -> Array:
        """`[..., *inputs]` to `[..., *outputs]`, in the compute dtype."""
        dtype = jnp.dtype(self.dtype)
        x = x.astype(dtype)
        if self.kernel_scale is None:
            y = product(x, self.kernel[...].astype(dtype), self.contracted)
        else:
            y = quantised_product(x, self.kernel[...], self.kernel_scale[...], self.contracted)
        if self.lora_a is not None and self.lora_b is not None:
            inner = jnp.tensordot(x, self.lora_a[...].astype(dtype), axes=self.contracted)
            y = y + self.lora_scale * jnp.tensordot(inner, self.lora_b[...].astype(dtype), axes=1)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def in_float32(self, x: Array) -> Array:
        """As a call, but factors in the dtype of `x`, sums and result in float32: for scores."""
        kernel = self.kernel[...].astype(x.dtype)
        y = product(x, kernel, self.contracted, jnp.float32)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def _quantised(
    kernel: nnx.Param[Array], inputs: int, how: Quantise
) -> tuple[nnx.Param[Array], nnx.Param[Array] | None]:
    """Codes and scales of a kernel that is stacked along layers; itself and `None` if it is not to be quantised."""
    if how == "none":
        return kernel, None
    axes, layers, *shape = kernel.get_metadata()["axes"], *kernel.shape
    sizes = quantised_shapes(shape, inputs, how)
    codes, scale = quantise(kernel[...], (layers, *sizes.scale), how)
    # Blocks are split as the numbers in them, if there are enough.
    parts = zip(axes[1:], shape, sizes.scale, strict=True)
    own = [name if held == size else None if held == 1 else f"{name}_blocks" for name, size, held in parts]
    unit, sides = kernel.get_metadata()["unit"], kernel.get_metadata()["sides"]
    scales = nnx.Param(scale, axes=("layers", *own), unit=Unit(LAYER, 0), sides=sides)
    return nnx.Param(codes, axes=axes, unit=unit, sides=sides), scales


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(
        self, rngs: nnx.Rngs, rows: int, embed: int, *, axes: Sequence[str | None], std: float, compute: Compute
    ) -> None:
        self.embedding = parameter(rngs.params(), (rows, embed), axes, std, compute, None, inputs=1)
        self.dtype = compute.dtype

    def __call__(self, indices: Int[Array, "..."]) -> Float[Array, "... embed"]:
        """The rows at `indices`, in the compute dtype."""
        return self.embedding[...][indices].astype(self.dtype)

    def logits(self, x: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Products with every row, summed in float32: the tied output head."""
        table = self.embedding[...].astype(x.dtype)
        return product(x, table.T, 1, jnp.float32)


NormScale = Literal["weight", "one_plus", "cast"]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32 (arXiv 1910.07467, equation 4).

    Args:
      sizes: sizes by axis name that the mean is taken over, the last dimensions of the argument.
      eps: added to the mean.
      compute: gives the dtype of the scale.
      layers: see `parameter`.
      how: what multiplies: the param; 1 plus the param (Gemma), which then starts at 0; or the param, after the cast to
        the dtype of the argument.
      unit: see `parameter`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        eps: float,
        compute: Compute,
        layers: int | None = None,
        how: NormScale = "weight",
        unit: str | None = None,
    ) -> None:
        start = 0.0 if how == "one_plus" else 1.0
        self.scale = constant(start, tuple(sizes.values()), tuple(sizes), compute, layers, unit)
        self.eps = eps
        self.how = how

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalises the last axes; dtype of `x`."""
        scale = self.scale[...]
        if self.how == "one_plus":
            scale = 1.0 + scale.astype(jnp.float32)
        if self.how == "cast":
            return _rms_norm(x, jnp.ones_like(scale), jnp.float32(self.eps)) * scale.astype(x.dtype)
        return _rms_norm(x, scale, jnp.float32(self.eps))


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias`, computed in float32 (arXiv 1607.06450).

    Args:
      embed: size of the axis that is normalised.
      eps: added to the variance.
      compute: gives the dtype of the params.
      layers: see `parameter`.
      bias: whether there is one.
    """

    def __init__(
        self, embed: int, *, eps: float, compute: Compute, layers: int | None = None, bias: bool = True
    ) -> None:
        self.scale = constant(1.0, (embed,), ("embed",), compute, layers)
        self.bias = constant(0.0, (embed,), ("embed",), compute, layers) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Normalises the last axis; dtype of `x`."""
        bias = None if self.bias is None else self.bias[...]
        return _layer_norm(x, self.scale[...], bias, jnp.float32(self.eps))


def dropout(x: Array, rate: float, key: Array) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Elements, hence the rows of a batch, draw independently; what a row draws depends on its index or on its own key,
    not on how many rows there are. The backward pass draws again: that is cheaper than to keep what was drawn.

    Args:
      x: hidden states or probabilities, rows first.
      rate: in [0, 1). Static.
      key: what is drawn depends on it and on the place in `x`. One for all rows, or one per row, `[rows]`.
    """
    threshold, scale = np.uint32(round(rate * 2**32)), np.float32(1.0 / (1.0 - rate))

    @recomputed
    def drop(x: Array, words: Array) -> Array:
        kept = place_hash(words, x.shape) >= threshold
        return jnp.where(kept, x * scale, 0).astype(x.dtype)

    return drop(x, derive(lambda one: jax.random.bits(one, (2,), jnp.uint32), key))


def derive(function: Callable[[Array], Array], keys: Array) -> Array:
    """`function` of a random key, or of each of several, `[rows]`: dropout takes both."""
    return jax.vmap(function)(keys) if keys.ndim else function(keys)


def place_hash(words: UInt32[Array, "2"] | UInt32[Array, "rows 2"], shape: Sequence[int]) -> UInt32[Array, "..."]:
    """Uniform 32-bit words, one a place of an array, for dropout.

    A keyed hash of the place: element-wise, so that it fuses with what reads it and splits over devices like it. On a
    CPU dropout takes more than ten times as long with `jax.random.bernoulli` (`benchmarks/das_cost.py`). Rows hash
    with keys of their own, so that a place is counted within its row and does not overflow.

    Args:
      words: the key that the rows' own are made of, by their index; or the rows' own.
      shape: rows first; a row has at most 2^32 elements.
    """
    column = (shape[0], *[1] * (len(shape) - 1))
    if words.ndim == 1:
        rows = jax.lax.broadcasted_iota(jnp.uint32, column, 0)
        first, second = (_keyed(2 * rows + place, words[0], words[1]) for place in (0, 1))
    else:
        first, second = (words[:, place].reshape(column) for place in (0, 1))
    inner = (1, *shape[1:])
    strides = [math.prod(inner[axis + 1 :]) for axis in range(len(inner))]
    places = [
        np.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, inner, axis) for axis, stride in enumerate(strides)
    ]
    return _keyed(sum(places[1:], places[0]), first, second)


@recomputed
def _rms_norm(x: Array, scale: Array, eps: Array) -> Array:
    wide = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


@recomputed
def _layer_norm(x: Array, scale: Array, bias: Array | None, eps: Array) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    wide = wide * scale.astype(jnp.float32)
    return (wide if bias is None else wide + bias.astype(jnp.float32)).astype(x.dtype)


def _keyed(place: Array, first: Array, second: Array) -> Array:
    return _mixed(_mixed(place ^ first) + second)


def _mixed(x: Array) -> Array:
    """A bijection of 32-bit words; each bit of the result hangs on each bit of `x` (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
