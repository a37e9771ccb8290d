r"""Importance of params by rows and columns: a number per input and a number per output of every matrix.

The importance of a param is its diagonal Fisher information: the mean square of the gradient of an example's loss. Of
a matrix, only the sums along either side are kept, $r_i = \sum_j F_{ij}$ and $c_j = \sum_i F_{ij}$, and read back as

$$\hat F_{ij} = \frac{r_i c_j}{\sum_i r_i},$$

which has the same sums. Where inputs and output gradients of a layer are independent, it is the Fisher information
itself (the diagonal of Martens & Grosse, 2015, arXiv 1503.05671, keeps the mean squares of both). Params that are no
matrices (biases, norms) are kept in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxcl.functional.soft_masks import Unit

Accumulation = Literal["sum", "maximum"]
Selection = Literal["measured", "permuted", "layer"]

_MOST = 4.0  # largest mask that keeps a layer's mean


class Sides(NamedTuple):
    """Which axes of a param index its inputs and its outputs; an axis in neither, such as that of layers, is a batch.

    Attributes:
      inputs: axes of the inputs; of a param that is no matrix, all its axes.
      outputs: axes of the outputs; empty for a param that is no matrix.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class RowColumn(NamedTuple):
    """Importance by rows and columns.

    Attributes:
      inputs: a tree like the params; sums over the output axes, which have size 1. In full for what is no matrix.
      outputs: likewise; sums over the input axes.
    """

    inputs: PyTree
    outputs: PyTree

    @classmethod
    def zero(cls, params: PyTree, sides: PyTree) -> RowColumn:
        """No importance.

        Args:
          params: the params, or anything with their tree and shapes.
          sides: a tree like `params` with `Sides` as leaves.
        """

        def zeros(summed: str) -> PyTree:
            return jax.tree.map(lambda leaf, side: jnp.zeros(_kept(leaf.shape, getattr(side, summed))), params, sides)

        return cls(zeros("outputs"), zeros("inputs"))

    @classmethod
    def of(cls, importance: PyTree, sides: PyTree) -> RowColumn:
        """The sums along either side of an importance that is given in full.

        Args:
          importance: of every param, a tree like the params.
          sides: see `zero`.

        Examples:
          >>> found = RowColumn.of(jnp.array([[1.0, 2.0], [3.0, 4.0]]), Sides((0,), (1,)))
          >>> found.inputs.tolist(), found.outputs.tolist()
          ([[3.0], [7.0]], [[4.0, 6.0]])
        """

        def sums(summed: str) -> PyTree:
            return jax.tree.map(
                lambda leaf, side: jnp.sum(leaf, axis=getattr(side, summed), keepdims=True), importance, sides
            )

        return cls(sums("outputs"), sums("inputs"))

    def add(self, importance: PyTree, sides: PyTree) -> RowColumn:
        """With the sums of an importance that is given in full added.

        Args:
          importance: of every param, a tree like the params.
          sides: see `zero`.
        """
        return jax.tree.map(jnp.add, self, RowColumn.of(importance, sides))

    def scaled(self, factor: Array | float) -> RowColumn:
        """Times a number."""
        return jax.tree.map(lambda leaf: leaf * factor, self)

    def accumulated(self, new: RowColumn, how: Accumulation, decay: float) -> RowColumn:
        """What is known before and after another domain.

        Neither way of accumulating saturates: values have no upper bound.

        Args:
          new: importance for the domain.
          how: `sum`: importance adds up, as the precision of independent data does; `maximum`: the larger one counts.
          decay: share of the earlier importance that is left, in [0, 1]; below 1, what no later domain needs is
            released step by step.
        """
        combine = jnp.add if how == "sum" else jnp.maximum
        return jax.tree.map(lambda before, now: combine(decay * before, now), self, new)

    def full(self, sides: PyTree) -> PyTree:
        """The importance of every param, `r_i c_j` divided by their geometric mean sum; shapes of the params.

        Sums of rows and of columns are equal, but for a maximum over domains.

        Examples:
          >>> RowColumn(jnp.array([[1.0], [3.0]]), jnp.array([[2.0, 2.0]])).full(Sides((0,), (1,))).tolist()
          [[0.5, 0.5], [1.5, 1.5]]
        """

        def product(rows: Array, columns: Array, side: Sides) -> Array:
            if not side.outputs:
                return rows
            return rows * (columns / _total(rows, columns, side))

        return jax.tree.map(product, self.inputs, self.outputs, sides)

    def evened(self, evenness: float, params: PyTree, sides: PyTree) -> PyTree:
        r"""The importance of every param, $(1 - e) F + e \bar F$ with the mean $\bar F$ over all params.

        A few params hold most of the Fisher information. The mean stays as it is; with `evenness` in [0, 1] params are
        more and more alike.

        Args:
          evenness: e.
          params: the params, or anything with their tree and shapes.
          sides: see `RowColumn.zero`.
        """
        mean = evenness * self.mean(params)
        return jax.tree.map(lambda leaf: (1 - evenness) * leaf + mean, self.full(sides))

    def mean(self, params: PyTree) -> Array:
        """The mean importance over all params, float32."""
        total = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(self.inputs)), jnp.float32(0))
        return total / sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def select(importance: RowColumn, sides: PyTree, how: Selection, key: PRNGKeyArray) -> RowColumn:
    """The importance, or a control that knows less of it.

    Args:
      importance: as measured.
      sides: see `RowColumn.zero`.
      how: `measured`: as it is; `permuted`: the numbers of a side are permuted, of every layer by itself; `layer`:
        every param of a layer's matrix gets its mean.
      key: for the permutations: the same key permutes alike.
    """
    if how == "measured":
        return importance
    keys = iter(jax.random.split(key, 2 * len(jax.tree.leaves(importance.inputs))))

    def change(values: Array, axes: tuple[int, ...]) -> Array:
        if how == "permuted":
            return _permuted(values, axes, next(keys))
        return jnp.broadcast_to(jnp.mean(values, axis=axes, keepdims=True), values.shape)

    return RowColumn(
        jax.tree.map(lambda values, side: change(values, side.inputs), importance.inputs, sides),
        jax.tree.map(lambda values, side: change(values, side.outputs), importance.outputs, sides),
    )


@jax.named_scope("soft_mask")
def importance_masks(importance: PyTree, sides: PyTree, *, strength: float, keep_mean: bool) -> PyTree:
    r"""Soft masks by params, $1 / (1 + c F / \bar F)$ with the mean $\bar F$ over all params; 1 if all are 0.

    Args:
      importance: of every param.
      sides: see `RowColumn.zero`.
      strength: c: a param of mean importance moves by `1 / (1 + c)`.
      keep_mean: divide by the mean over each layer's param, up to 4, so that mean steps are as without masks.

    Returns:
      A tree like the params, float32.

    Examples:
      >>> importance_masks(jnp.array([1.0, 0.0]), Sides((0,), ()), strength=1.0, keep_mean=False).tolist()
      [0.3333333432674408, 1.0]
    """
    leaves = jax.tree.leaves(importance)
    mean = sum((jnp.sum(leaf) for leaf in leaves), jnp.float32(0)) / sum(leaf.size for leaf in leaves)
    mean = jnp.where(mean == 0, 1.0, mean)

    def mask(values: Array, side: Sides) -> Array:
        found = 1.0 / (1.0 + strength * values / mean)
        if not keep_mean:
            return found
        return jnp.minimum(found / jnp.mean(found, axis=(*side.inputs, *side.outputs), keepdims=True), _MOST)

    return jax.tree.map(mask, importance, sides)


def unit_means(values: PyTree, units: PyTree, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
    """The mean of params' values over the params of each unit.

    Args:
      values: a tree of params' values; the first axis runs along the layers, unless the unit says which layer it is.
      units: a tree like `values` with a `Unit` per param, `None` for those outside layers. A param whose axis is
        shorter than the number of units counts for each unit of a group.
      sizes: number of layers and units by kind.

    Returns:
      `[layers, units]` by kind; 0 for units without params.
    """
    total = {kind: jnp.zeros(size) for kind, size in sizes.items()}
    count = {kind: np.zeros(size[0]) for kind, size in sizes.items()}

    def add(leaf: Array, unit: Unit | None) -> None:
        if unit is None or unit.kind not in sizes:
            return
        along = unit.axis if isinstance(unit.axis, tuple) else (unit.axis,)
        own = along if unit.layer is not None else (0, *along)
        others = tuple(axis for axis in range(leaf.ndim) if axis not in own)
        units, groups = sizes[unit.kind][1], math.prod(leaf.shape[axis] for axis in along)
        sums = jnp.repeat(jnp.sum(leaf, axis=others).reshape(-1, groups), units // groups, axis=1)
        layers = slice(None) if unit.layer is None else slice(unit.layer, unit.layer + 1)
        total[unit.kind] = total[unit.kind].at[layers].add(sums)
        count[unit.kind][layers] += math.prod(leaf.shape[axis] for axis in others)

    jax.tree.map(add, values, units)
    return {kind: total[kind] / np.maximum(count[kind], 1.0)[:, None] for kind in sizes}


def _kept(shape: tuple[int, ...], summed: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in summed else size for axis, size in enumerate(shape))


def _total(rows: Array, columns: Array, side: Sides) -> Array:
    """What products of rows and columns are divided by; 1 where all are 0."""
    totals = jnp.sum(rows, axis=side.inputs, keepdims=True), jnp.sum(columns, axis=side.outputs, keepdims=True)
    total = jnp.sqrt(totals[0]) * jnp.sqrt(totals[1])
    return jnp.where(total == 0, 1.0, total)


def _permuted(values: Array, axes: tuple[int, ...], key: Array) -> Array:
    """`values` with the entries along `axes`, taken together, in another order at each place of the other axes."""
    last = range(values.ndim - len(axes), values.ndim)
    moved = jnp.moveaxis(values, axes, last)
    flat = moved.reshape(*moved.shape[: values.ndim - len(axes)], -1)
    flat = jax.random.permutation(key, flat, axis=-1, independent=True)
    return jnp.moveaxis(flat.reshape(moved.shape), last, axes)
