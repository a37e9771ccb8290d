"""Where everything of a run lives: the mesh and the sharding of params, state and batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxcl.sharding import rules

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of a run's arrays, decided once.

    Attributes:
      mesh: the device mesh.
      shapes: `jax.ShapeDtypeStruct` of every param.
      params: `NamedSharding` of every param, same tree.
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
          UserError: a size that does not divide.
        """
        return cls(mesh, shapes, rules.shardings(axes, shapes, mesh, table))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return rules.replicated(self.mesh)

    @property
    def batch(self) -> NamedSharding:
        """For every array of a batch: rows split, the rest whole."""
        return rules.batch_sharding(self.mesh)

    @property
    def batch_ways(self) -> int:
        """Number of parts a batch is split into; batch sizes are multiples of it."""
        return rules.batch_ways(self.mesh)

    def like_params(self, tree: PyTree) -> PyTree:
        """Shardings of a tree that may hold copies of the params; see `rules.mirror`."""
        return rules.mirror(tree, self.shapes, self.params, self.mesh)

    def place(self, tree: PyTree) -> PyTree:
        """Moves host or device arrays to where `like_params` says they live."""
        return jax.device_put(tree, self.like_params(tree))
