"""Soft masks: params move less the more their units matter to what is known (DAS, section 3.2).

A mask is `1 - importance` of the unit that a param belongs to, in a shape that broadcasts to the param. Attention
heads mask query, key and value projections on their head axis and the output projection on its input side;
intermediate units the columns into them; feed-forward outputs the columns of the last projection; biases alike. A
key/value head that several heads share takes the largest importance among them. The authors' code masks the input
axis of query, key and value, and masks each micro-batch, so that accumulation compounds.

Params that belong to no single unit (embeddings, norms, output heads, the output projection's bias) are `shared`. Of an
adapter, the side that belongs to its projection's units is masked like the kernel, and the other side is `shared`: with
`free`, a protected unit still moves with the inner directions that it shares with the others.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxcl.methods.base import OptimizerParts
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network

PyTree = Any
MaskOn = Literal["update", "gradient"]
Shared = Literal["free", "mean", "frozen"]

# Unit that each param of a layer belongs to, and the axis of the stacked param that runs along the units.
_UNITS: dict[str, tuple[str, int]] = {
    "attention/query/kernel": ("heads", 2),
    "attention/query/bias": ("heads", 1),
    "attention/key/kernel": ("kv_heads", 2),
    "attention/key/bias": ("kv_heads", 1),
    "attention/value/kernel": ("kv_heads", 2),
    "attention/value/bias": ("kv_heads", 1),
    "attention/out/kernel": ("heads", 1),
    "mlp/gate/kernel": ("intermediate", 2),
    "mlp/gate/bias": ("intermediate", 1),
    "mlp/up/kernel": ("intermediate", 2),
    "mlp/up/bias": ("intermediate", 1),
    "mlp/down/kernel": ("output", 2),
    "mlp/down/bias": ("output", 1),
    "attention/query/lora_b": ("heads", 2),
    "attention/key/lora_b": ("kv_heads", 2),
    "attention/value/lora_b": ("kv_heads", 2),
    "attention/out/lora_a": ("heads", 1),
    "mlp/gate/lora_b": ("intermediate", 2),
    "mlp/up/lora_b": ("intermediate", 2),
    "mlp/down/lora_b": ("output", 2),
}
_SHARED_IN_LAYERS = (
    "attention/out/bias",
    "attention_norm/scale",
    "attention_norm/bias",
    "mlp_norm/scale",
    "mlp_norm/bias",
    "attention/query/lora_a",
    "attention/key/lora_a",
    "attention/value/lora_a",
    "attention/out/lora_b",
    "mlp/gate/lora_a",
    "mlp/up/lora_a",
    "mlp/down/lora_a",
)
_SHARED = ("embed/", "soft_tokens/", "final_norm/", "head/", "classifier/")


@jax.named_scope("soft_mask")
def soft_masks(network: Network, importance: Gates, shared: Shared) -> PyTree:
    """The mask of every param.

    Args:
      network: the network.
      importance: in [0, 1], leaves `[layers, units]`.
      shared: what happens to params that belong to no single unit: `free` (mask 1, as in the paper), `frozen`
        (mask 0), or `mean` (1 minus the mean importance of the layer's units, of all layers for params outside).

    Returns:
      The params' tree with arrays that broadcast to the params, float32.

    Raises:
      ValueError: a param is neither covered nor known as shared; the message names it.
    """
    group = network.num_heads // network.num_kv_heads
    heads = importance.heads
    units = {
        "heads": heads,
        "kv_heads": heads.reshape(*heads.shape[:-1], network.num_kv_heads, group).max(axis=-1),
        "intermediate": importance.intermediate,
        "output": importance.output,
    }
    layer_mean = jnp.mean(jnp.stack([jnp.mean(leaf, axis=-1) for leaf in jax.tree.leaves(importance)]), axis=0)

    def mask(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        inner = name.removeprefix("blocks/")
        if inner != name and inner in _UNITS:
            kind, axis = _UNITS[inner]
            return 1.0 - _along(units[kind], leaf, axis, name)
        if inner != name and inner in _SHARED_IN_LAYERS:
            return _shared_mask(shared, layer_mean.reshape(-1, *[1] * (len(leaf.shape) - 1)))
        if inner == name and name.startswith(_SHARED):
            return _shared_mask(shared, jnp.mean(layer_mean))
        raise ValueError(f"soft_masks: param {name} is neither covered by a unit nor known as shared")

    return jax.tree_util.tree_map_with_path(mask, network.shapes())


def soft_mask() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the keyword argument `masks` of `update`; has no state.

    It may stand before or after the preconditioner. Masks are cast to the updates' dtype, so that a mask of 1 changes
    no bit.

    Examples:
      >>> transform = soft_mask()
      >>> state = transform.init({"w": jnp.ones(2)})
      >>> transform.update({"w": jnp.ones(2)}, state, masks={"w": jnp.array([0.25])})[0]["w"].tolist()
      [0.25, 0.25]
    """

    @jax.named_scope("soft_mask")
    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, masks: PyTree, **_: Any) -> Any:
        return _times(updates, masks), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def masked_decay(decay: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Weight decay that sees masked params, so that it does not move what the mask protects."""
    inner = optax.with_extra_args_support(decay)

    def update(updates: PyTree, state: PyTree, params: PyTree, *, masks: PyTree, **extra: Any) -> Any:
        return inner.update(updates, state, _times(params, masks), masks=masks, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def masked_optimizer(parts: OptimizerParts, mask_on: MaskOn) -> optax.GradientTransformationExtraArgs:
    """The optimizer with the soft mask in it. Its `update` needs the keyword argument `masks`.

    `update` masks what Adam made of the gradient, weight decay included. `gradient` is the paper's text; Adam divides
    a constant factor out again, so it acts through epsilon, through masks of exactly 0 and through the masked decay.
    Either way importance 0 is the plain optimizer to the bit. With `update` this holds for compiled programs too: the
    mask stands before the learning rate, where a compiler that contracts products and sums contracts the same ones
    with and without it. With `gradient` such a compiler may round Adam's sums differently in the last bit, and moments
    that outlive a task (`optimizer.reset_optimizer: false`) go on moving what has become important since.

    Args:
      parts: the optimizer in pieces. Gradients are clipped before they are masked: the clip sees what plain training
        would see.
      mask_on: where the mask acts.
    """
    clip, precondition, decay, rate = parts
    if mask_on == "update":
        return optax.with_extra_args_support(optax.chain(clip, precondition, decay, soft_mask(), rate))
    return optax.with_extra_args_support(optax.chain(clip, soft_mask(), precondition, masked_decay(decay), rate))


def _along(
    importance: Float[Array, "layers units"], leaf: jax.ShapeDtypeStruct, axis: int, name: str
) -> Float[Array, "layers ..."]:
    layers, units = importance.shape
    if leaf.shape[0] != layers or leaf.shape[axis] != units:
        raise ValueError(
            f"soft_masks: param {name}: expected {layers} layers and {units} units on axis {axis}, got {leaf.shape}"
        )
    shape = [1] * len(leaf.shape)
    shape[0], shape[axis] = layers, units
    return importance.reshape(shape)


def _shared_mask(shared: Shared, mean: Array) -> Array:
    if shared == "mean":
        return 1.0 - mean
    return jnp.float32(1.0 if shared == "free" else 0.0)


def _times(tree: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, mask: leaf * mask.astype(leaf.dtype), tree, masks)
