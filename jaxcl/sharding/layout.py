"""The mesh of a run and the shardings of params, state and batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxcl.sharding import rules


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of a run's arrays, decided once.

    Attributes:
      mesh: the device mesh.
      shapes: `jax.ShapeDtypeStruct` of every param.
      params: `NamedSharding` of every param, as the same tree.
    """

    mesh: Mesh
    shapes: PyTree
    params: PyTree

    @classmethod
    def create(cls, mesh: Mesh, axes: PyTree, shapes: PyTree, table: rules.Rules = rules.PARAM_RULES) -> Layout:
        """Decides the shardings.

        Args:
          mesh: the device mesh.
          axes: tuples of logical axis names (`Network.axes()`).
          shapes: shapes and dtypes of the params (`Network.shapes()`), same tree.
          table: mesh axes of each logical name.

        Raises:
          ValueError: an unknown axis name or a collision of mesh axes.
          UserError: a size that is not divisible.
        """
        return cls(mesh, shapes, rules.shardings(axes, shapes, mesh, table))

    @property
    def replicated(self) -> NamedSharding:
        """A full copy on every device."""
        return rules.replicated(self.mesh)

    @property
    def batch(self) -> NamedSharding:
        """For every array of a batch: rows are split, other axes are not."""
        return rules.batch_sharding(self.mesh)

    @property
    def batch_ways(self) -> int:
        """Number of parts a batch is split into; batch sizes are multiples of it."""
        return rules.batch_ways(self.mesh)

    def like_params(self, tree: PyTree) -> PyTree:
        """Shardings of a tree that may hold copies of the params; see `rules.mirror`."""
        return rules.mirror(tree, self.shapes, self.params, self.mesh)

    def place(self, tree: PyTree) -> PyTree:
        """Moves host or device arrays to the shardings of `like_params`."""
        return put(tree, self.like_params(tree))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """`jax.device_put` that also works with several processes.

    Args:
      tree: numpy arrays, arrays of this process (the same values in every process) or global arrays.
      shardings: a `NamedSharding` for all leaves, or a tree of them.

    Returns:
      Global arrays with these shardings.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: _put_leaf(leaf, shardings), tree)
    return jax.tree.map(_put_leaf, tree, shardings)


def _put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One leaf of `put`: `jax.device_put` does not move an array of one process to devices of others."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = jax.random.key_impl(leaf)
        data = _put_leaf(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.jit(lambda data: jax.random.wrap_key_data(data, impl=kind), out_shardings=sharding)(data)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
