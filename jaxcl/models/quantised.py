"""Frozen kernels in 8 or 4 bits, dequantised inside the layer that uses them (QLoRA, Dettmers et al. 2023, 2305.14314).

- `int8`: integers from -127 to 127, and a float32 scale per output channel, its largest absolute value / 127.
- `nf4`: numbers of one of 16 levels, which hold equal shares of a normal distribution, in blocks of 64 along the last
  input axis; a float32 scale per block, its largest absolute value. Two numbers share a byte of uint8, the first in its
  upper half. Where 64 does not divide the axis, blocks are as long as the largest power of two that does.

A kernel `[.., inputs.., outputs..]` becomes codes and scales with as many axes. Where an axis has one scale, or fewer
scales than codes, its numbers share them: the two arrays say themselves how to read them.

The library qwix has the same levels, but holds 4-bit numbers a byte each, as objects that a params tree of arrays, its
checkpoints and its shardings would have to know.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from jaxcl.models.product import PRODUCT
from jaxcl.models.trainable import Params

Quantise = Literal["none", "int8", "nf4"]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of `nf4` (appendix E)."""

_BLOCK = 64
_STEPS = 127


class Quantised(NamedTuple):
    """A kernel's codes and scales, or their shapes."""

    codes: Any
    scale: Any


def check_quantise(how: Quantise, adapters: object, **sizes: int) -> None:
    """Checks that a model's kernels can be held so.

    Args:
      how: how they are to be held.
      adapters: of the model; `None` has none.
      **sizes: sizes of its last input axes, by the configuration's names.

    Raises:
      ValueError: nothing would be left to train, or a size does not fit.
    """
    if how != "none" and adapters is None:
        raise ValueError(
            f"quantise: {how} holds weights that are not trained; set model.lora, such as its rank, or none"
        )
    for name, size in sizes.items():
        if how == "nf4" and size % 4:
            raise ValueError(f"quantise: nf4 needs {name} to be a multiple of 4, got {size}")


def quantised_shapes(shape: Sequence[int], inputs: int, how: Quantise) -> Quantised:
    """Shapes of the codes and scales of a kernel within a layer.

    Args:
      shape: of the kernel, `[inputs.., outputs..]`; for `nf4`, the last input axis is a multiple of 4.
      inputs: how many of its axes are inputs.
      how: `int8` or `nf4`.

    Examples:
      >>> quantised_shapes((4096, 32, 128), 1, "nf4")
      Quantised(codes=(2048, 32, 128), scale=(64, 32, 128))
      >>> quantised_shapes((32, 128, 4096), 2, "int8")
      Quantised(codes=(32, 128, 4096), scale=(1, 1, 4096))
    """
    shape, axis = tuple(shape), inputs - 1
    if how == "int8":
        return Quantised(shape, (*(1 for _ in shape[:inputs]), *shape[inputs:]))
    size = shape[axis]
    codes, scale = ((*shape[:axis], part, *shape[inputs:]) for part in (size // 2, size // math.gcd(size, _BLOCK)))
    return Quantised(codes, scale)


def quantise(kernel: Float[Array, "..."], scale_shape: Sequence[int], how: Quantise) -> Quantised:
    """The nearest codes of a kernel, and their scales; pure.

    Args:
      kernel: `[.., inputs.., outputs..]`.
      scale_shape: of its scales, see `quantised_shapes`, with the kernel's leading axes.
      how: `int8` or `nf4`.

    Returns:
      Codes, int8 or uint8, and scales, float32.

    Examples:
      >>> codes, scale = quantise(jnp.array([[1.0, 2.0], [-0.5, 0.1]]), (1, 2), "int8")
      >>> codes.tolist(), [round(one, 4) for one in scale[0].tolist()]
      ([[127, 127], [-64, 6]], [0.0079, 0.0157])
    """
    kernel = kernel.astype(jnp.float32)
    if how == "int8":
        shared = tuple(axis for axis, size in enumerate(scale_shape) if size == 1)
        scale = jnp.max(jnp.abs(kernel), axis=shared, keepdims=True) / _STEPS
        codes = jnp.round(kernel / jnp.where(scale == 0, 1.0, scale))
        return Quantised(jnp.clip(codes, -_STEPS, _STEPS).astype(jnp.int8), scale)
    axis = _blocked(kernel.shape, scale_shape)
    blocks = kernel.reshape(*scale_shape[: axis + 1], -1, *scale_shape[axis + 1 :])
    scale = jnp.max(jnp.abs(blocks), axis=axis + 1)
    values = (blocks / jnp.expand_dims(jnp.where(scale == 0, 1.0, scale), axis + 1)).reshape(kernel.shape)
    codes = jnp.zeros(kernel.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += (values > (low + high) / 2).astype(jnp.uint8)
    return Quantised(_packed(codes, axis), scale)


def dequantise(codes: Int[Array, "..."], scale: Float[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The kernel that codes and scales stand for; pure.

    Args:
      codes: as from `quantise`, whole or one layer's.
      scale: their scales.
      dtype: of the result; the product is float32 and rounded once.
    """
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    axis = _blocked(codes.shape, scale.shape)
    whole = _unpacked(codes, axis)
    blocks = whole.reshape(*scale.shape[: axis + 1], -1, *scale.shape[axis + 1 :])
    return _levels(blocks, jnp.expand_dims(scale, axis + 1)).reshape(whole.shape).astype(dtype)


def quantised_product(
    x: Float[Array, "..."], codes: Int[Array, "..."], scale: Float[Array, "..."], contracted: int
) -> Array:
    """As `jaxcl.models.product.product` with the dequantised kernel in the dtype of `x`; that is a constant.

    The backward pass dequantises once more, so that the kernel itself is never kept.

    Args:
      x: `[*rows, *inputs]`.
      codes: of a kernel `[*inputs, *outputs]`.
      scale: their scales.
      contracted: number of dimensions in `inputs`. Static.

    Returns:
      `[*rows, *outputs]`.
    """
    return checkpoint_name(_product(x, codes, scale, contracted), PRODUCT)


def dequantised(tree: Mapping[str, Any]) -> Params:
    """A params tree with float32 kernels in place of codes and scales; other leaves stay.

    >>> dequantised({"up": {"kernel": jnp.array([[-127, 1]], jnp.int8), "kernel_scale": jnp.array([[0.5, 2.0]])}})
    {'up': {'kernel': Array([[-63.5,   2. ]], dtype=float32)}}
    """
    found: Params = {name: dequantised(node) if isinstance(node, Mapping) else node for name, node in tree.items()}
    if "kernel_scale" in found:
        found["kernel"] = dequantise(found["kernel"], found.pop("kernel_scale"))
    return found


def cast(tree: Params, dtype: Any) -> Params:
    """The leaves of a params tree in another dtype, but codes and scales as they are.

    >>> tree = cast({"kernel": jnp.zeros(1, jnp.int8), "bias": jnp.zeros(1)}, "bfloat16")
    >>> jax.tree.map(lambda leaf: str(leaf.dtype), tree)
    {'bias': 'bfloat16', 'kernel': 'int8'}
    """

    def leaf(path: Any, value: Array) -> Array:
        own = path[-1].key == "kernel_scale" or jnp.issubdtype(value.dtype, jnp.integer)
        return value if own else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def scale_path(path: str) -> str:
    """The path of a kernel's scales.

    >>> scale_path("blocks/mlp/up/kernel")
    'blocks/mlp/up/kernel_scale'
    """
    return f"{path}_scale"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, codes: Array, scale: Array, contracted: int) -> Array:
    return jnp.tensordot(x, dequantise(codes, scale, x.dtype), axes=contracted)


def _forward(x: Array, codes: Array, scale: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, codes, scale, contracted), (codes, scale)


def _backward(contracted: int, kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    kernel = dequantise(*kept, dy.dtype)
    inner = range(contracted, kernel.ndim)
    return jax.lax.dot_general(dy, kernel, ((range(dy.ndim - len(inner), dy.ndim), inner), ((), ()))), None, None


_product.defvjp(_forward, _backward)


def _blocked(shape: Sequence[int], scale_shape: Sequence[int]) -> int:
    """The axis along which numbers share scales."""
    return next(axis for axis, (size, scales) in enumerate(zip(shape, scale_shape, strict=True)) if size != scales)


def _packed(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    pairs = codes.reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, place, axis + 1, keepdims=False) for place in (0, 1))
    return first << 4 | second


def _unpacked(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    pairs = jnp.stack([codes >> 4, codes & 15], axis + 1)
    return pairs.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])


def _levels(codes: UInt8[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The levels of codes times their scales, chosen bit by bit: accelerators are slow at looking up single numbers.

    The levels of each block are scaled first: levels alone would be constants, and XLA on CPUs would make an array of
    the kernel's size of each, outside the loop over layers.
    """
    values: list[Any] = [level * scale for level in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
