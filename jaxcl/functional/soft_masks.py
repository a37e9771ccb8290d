"""Soft masks: params move less the more their units matter to what is known (DAS, section 3.2).

Which unit a param belongs to is data: a tree like the params whose leaves are `Unit`s. A mask is `1 - importance` of
the param's unit, in a shape that broadcasts to the param. It may act before the optimizer's preconditioner, as in the
paper, or after it: Adam divides a constant factor on a gradient out again.

The authors' code masks the input axis of query, key and value projections, and masks each micro-batch, so that
accumulation compounds the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxcl.functional.norm import global_norm

MaskOn = Literal["update", "gradient"]
Shared = Literal["free", "mean", "frozen"]


class Unit(NamedTuple):
    """The kind of unit that a param belongs to, and where its units lie.

    Attributes:
      kind: a key of the importance: `heads`, `intermediate`, `output`, or any other name.
      axis: the param's axis that runs along the units. If it is shorter than the number of units, each entry serves a
        group of them, as a key/value head serves several query heads, and gets the largest importance of its group.
        Several axes, in rising order: units are numbered along them, the last one fastest, as those of experts are.
      layer: the layer of a param that belongs to one layer; `None` for a param whose first axis runs along the layers.
    """

    kind: str
    axis: int | tuple[int, ...]
    layer: int | None = None


LAYER = "layer"
"""Kind of a param that belongs to a layer but to none of its units, such as the scale of a norm: `Unit(LAYER, 0)`."""

TOWER, CONNECTOR = "tower_", "connector_"
"""How the kinds of a vision tower and of its connector begin, such as `tower_heads` and `tower_layer`.

Their layers are not the decoder's.
"""


@jax.named_scope("soft_mask")
def soft_masks(
    units: PyTree, params: PyTree, importance: Mapping[str, Float[Array, "layers units"]], shared: Shared = "free"
) -> PyTree:
    """The mask of every param.

    Args:
      units: a tree like `params` with a `Unit` for each param; `None` for one that belongs to the whole model, such as
        an embedding or an output head.
      params: the params, or anything with their tree and shapes.
      importance: of each kind of unit, in [0, 1].
      shared: what happens to params that belong to no single unit: `free` (mask 1, as in the paper), `frozen`
        (mask 0), or `mean` (1 minus the mean importance of the layer's units, or of all layers, those of a tower and
        a connector included).

    Returns:
      The params' tree with arrays that broadcast to the params, float32.

    Raises:
      ValueError: a unit does not fit its param or the importance; the message names the param.

    Examples:
      >>> units = {"up": Unit("intermediate", axis=2), "norm": None}
      >>> params = {"up": jnp.ones((1, 2, 3)), "norm": jnp.ones(2)}
      >>> masks = soft_masks(units, params, {"intermediate": jnp.array([[0.0, 0.25, 1.0]])})
      >>> masks["up"].tolist(), masks["norm"].tolist()
      ([[[1.0, 0.75, 0.0]]], 1.0)
    """
    stacks: dict[str, list[Array]] = {}
    for kind, values in importance.items():
        stacks.setdefault(_stack(kind), []).append(jnp.mean(values, axis=-1))
    layer_means = {stack: jnp.mean(jnp.stack(means), axis=0) for stack, means in stacks.items()}
    mean_of_all = jnp.mean(jnp.concatenate(list(layer_means.values())))

    def mask(path: Any, leaf: Any, unit: Unit | None) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if unit is None:
            return _shared_mask(shared, mean_of_all)
        stack = _stack(unit.kind)
        if unit.kind == stack + LAYER and stack in layer_means:
            means = layer_means[stack]
            mean = means.reshape(-1, *[1] * (len(leaf.shape) - 1)) if unit.layer is None else means[unit.layer]
            return _shared_mask(shared, mean)
        if unit.kind not in importance:
            raise ValueError(f"soft_masks: param {name}: no importance of {unit.kind}, only of {', '.join(importance)}")
        return 1.0 - _along(importance[unit.kind], leaf, unit, name)

    return jax.tree_util.tree_map_with_path(mask, params, units)


def soft_mask() -> optax.GradientTransformationExtraArgs:
    """A transformation that multiplies updates by the keyword argument `masks`; a mask of 1 changes no bit.

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


def clip_by_what_moves(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Scales the whole gradient as `clip` scales what its masks let through.

    Params that masks hold cannot descend, so their gradients stay large and fill the norm of a plain clip: the others
    then move less. This clip leaves them out of the norm.

    Args:
      clip: one that scales a gradient as a whole, such as `optax.clip_by_global_norm`.

    Examples:
      >>> transform = clip_by_what_moves(optax.clip_by_global_norm(1.0))
      >>> gradient, masks = jnp.array([10.0, 0.5]), jnp.array([0.0, 1.0])
      >>> transform.update(gradient, transform.init(gradient), masks=masks)[0].tolist()
      [10.0, 0.5]
    """

    def update(gradient: PyTree, state: PyTree, params: PyTree = None, *, masks: PyTree, **_: Any) -> Any:
        moving = _times(gradient, masks)
        clipped, state = clip.update(moving, state, params)
        before, after = global_norm(moving), global_norm(clipped)
        factor = jnp.where(before == 0, 1.0, after / jnp.where(before == 0, 1.0, before))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(clip.init, update)


def masked_decay(decay: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Weight decay that sees masked params, so that it does not move what the mask protects."""
    inner = optax.with_extra_args_support(decay)

    def update(updates: PyTree, state: PyTree, params: PyTree, *, masks: PyTree, **extra: Any) -> Any:
        return inner.update(updates, state, _times(params, masks), masks=masks, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def masked_optimizer(
    *,
    clip: optax.GradientTransformation,
    precondition: optax.GradientTransformation,
    weight_decay: optax.GradientTransformation,
    learning_rate: optax.GradientTransformation,
    mask_on: MaskOn,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with the soft mask in it. Its `update` needs the keyword argument `masks`.

    With `update` the mask acts on what Adam made of the gradient, weight decay included. With `gradient`, the paper's
    text, it acts before; Adam divides a constant factor out again, so it acts through epsilon, through masks of exactly
    0 and through the masked decay.

    Either way importance 0 is the plain optimizer to the bit. With `update` this holds for compiled programs too: the
    mask comes before the learning rate, so that a compiler that fuses products and sums fuses the same ones with and
    without it. With `gradient` such a compiler may round Adam's sums differently in the last bit, and moments that
    outlive a task (`optimizer.reset_optimizer: false`) go on moving what has become important since.

    Args:
      clip: clips the gradient before it is masked: it sees what plain training would see, unless it is
        `clip_by_what_moves`.
      precondition: Adam's, for example.
      weight_decay: adds the decay.
      learning_rate: scales and negates.
      mask_on: where the mask acts.
    """
    if mask_on == "update":
        return optax.with_extra_args_support(optax.chain(clip, precondition, weight_decay, soft_mask(), learning_rate))
    decay = masked_decay(weight_decay)
    return optax.with_extra_args_support(optax.chain(clip, soft_mask(), precondition, decay, learning_rate))


def _stack(kind: str) -> str:
    """Which layers a kind of unit belongs to: how it begins, or nothing for the model's own."""
    return next((start for start in (TOWER, CONNECTOR) if kind.startswith(start)), "")


def _along(importance: Float[Array, "layers units"], leaf: Any, unit: Unit, name: str) -> Float[Array, "..."]:
    """The importance of a param's units in a shape that broadcasts to it."""
    values = importance if unit.layer is None else importance[unit.layer]
    axes = (unit.axis,) if isinstance(unit.axis, int) else unit.axis
    sizes = [leaf.shape[axis] for axis in axes]
    layers, units, size = len(importance), importance.shape[-1], math.prod(sizes)
    if units % size or (unit.layer is None and leaf.shape[0] != layers):
        raise ValueError(
            f"soft_masks: param {name}: expected {layers} layers and {units} {unit.kind} (or groups of them) on axis "
            f"{unit.axis}, got {leaf.shape}"
        )
    values = values.reshape(*values.shape[:-1], size, units // size).max(axis=-1)
    shape = [own if axis in axes else 1 for axis, own in enumerate(leaf.shape)]
    if unit.layer is None:
        shape[0] = layers
    return values.reshape(shape)


def _shared_mask(shared: Shared, mean: Array) -> Array:
    if shared == "mean":
        return 1.0 - mean
    return jnp.float32(1.0 if shared == "free" else 0.0)


def _times(tree: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, mask: leaf * mask.astype(leaf.dtype), tree, masks)
