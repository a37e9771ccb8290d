"""From logical axis names to shardings: one table, one function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxcl.errors import UserError

logger = logging.getLogger(__name__)

Names = Sequence[str | None]
Rules = Mapping[str, tuple[str, ...]]

PARAM_RULES: Rules = {
    "layers": (),
    "tower_layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "expert_mlp": (),
    "vocab": ("tensor",),
    "length": (),
    "labels": (),
    "rank": (),
    "embed_blocks": ("fsdp",),
    "head_dim_blocks": (),
    "mlp_blocks": ("tensor",),
}
"""Mesh axes that split each logical axis of params, optimizer state and method state."""

ACTIVATION_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "vocab": ("tensor",),
    "labels": (),
}
"""The same for activations: `fsdp` splits their batch axis, so `embed` is not split."""

WHOLE_IF_UNEVEN = frozenset({"heads", "kv_heads", "vocab", "labels", "embed_blocks", "mlp_blocks"})
"""Axes that are replicated if their size is not a multiple of the mesh axis (9 heads over tensor=2)."""

BATCH_AXES = ACTIVATION_RULES["batch"]


def partition(
    names: Names, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules, where: str = "array"
) -> PartitionSpec:
    """The partition of one array.

    Args:
      names: logical name of each axis, `None` for an axis that is never split.
      shape: size of each axis.
      mesh: the mesh.
      rules: mesh axes of each logical name.
      where: name of the array in messages.

    Returns:
      One entry per axis. Mesh axes of size 1 are left out.

    Raises:
      ValueError: the number of names differs from the number of axes, a name has no rule, or two axes of the array
        would be split over the same mesh axis.
      UserError: a size is not a multiple of the mesh axes that split it, unless the axis is in `WHOLE_IF_UNEVEN`.

    Examples:
      >>> mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
      >>> partition(("layers", "embed", "heads", None), (3, 8, 4, 2), mesh, PARAM_RULES)
      P(None, 'fsdp', 'tensor', None)
    """
    if len(names) != len(shape):
        raise ValueError(f"{where}: expected an axis name for each of the {len(shape)} axes of {shape}, got {names}")
    entries: list[str | tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is None:
            entries.append(None)
            continue
        if name not in rules:
            raise ValueError(f"{where}: no rule for axis {name!r}; known axes: {', '.join(rules)}")
        for axis in rules[name]:
            if axis in owner:
                raise ValueError(f"{where}: axes {owner[axis]!r} and {name!r} are both split over mesh axis {axis!r}")
            owner[axis] = name
        axes = tuple(axis for axis in rules[name] if mesh.shape.get(axis, 1) > 1)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            if name not in WHOLE_IF_UNEVEN:
                raise UserError(
                    f"{where}: axis {name} of size {size} cannot be split over mesh {_label(axes, mesh)}; "
                    f"the size must be a multiple of {ways}",
                    exit_code=2,
                )
            _note(f"axis {name} of size {size} is kept whole on mesh {_label(axes, mesh)}")
            axes = ()
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def shardings(axes: PyTree, shapes: PyTree, mesh: Mesh, rules: Rules = PARAM_RULES) -> PyTree:
    """The sharding of every array of a tree.

    Args:
      axes: tree whose leaves are tuples of logical axis names (or `None` for an array that is replicated).
      shapes: the same tree with leaves that have a `shape`.
      mesh: the mesh.
      rules: mesh axes of each logical name.

    Returns:
      The same tree with `NamedSharding` leaves.

    Raises:
      ValueError: the trees differ, or see `partition`; the message names the leaf's path.
      UserError: a size is not divisible (see `partition`).
    """

    def leaf(path: Any, names: Names | None, shape: Any) -> NamedSharding:
        if names is None:
            return replicated(mesh)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(tuple(names), shape.shape, mesh, rules, where))

    return jax.tree_util.tree_map_with_path(leaf, axes, shapes, is_leaf=lambda node: node is None or _is_names(node))


def mirror(tree: PyTree, params: PyTree, params_shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree that may contain copies of the params (optimizer moments, a method's snapshots).

    A subtree with the structure of the params, or of a part of them (such as the trained ones), is sharded like them,
    leaf by leaf, where the shapes agree; everything else is replicated.

    Args:
      tree: any tree of arrays or of shapes.
      params: tree of arrays or shapes of the params.
      params_shardings: the sharding of each param.
      mesh: the mesh.

    Returns:
      The structure of `tree` with `NamedSharding` leaves.
    """
    paths, shardings = jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(params_shardings)
    known = {path: (param.shape, sharding) for (path, param), sharding in zip(paths, shardings, strict=True)}
    whole = replicated(mesh)

    def part_of_params(node: PyTree) -> bool:
        found = [path for path, _ in jax.tree_util.tree_flatten_with_path(node)[0]]
        return bool(found) and all(path in known for path in found)

    def place_leaf(path: Any, leaf: Any) -> NamedSharding:
        shape, sharding = known[path]
        return sharding if leaf.shape == shape else whole

    def place(node: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(place_leaf, node) if part_of_params(node) else whole

    return jax.tree.map(place, tree, is_leaf=part_of_params)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over `data` and `fsdp`, the others not split; for every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
    """Number of parts that `batch_sharding` splits a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


class Activations:
    """The shardings of activations by logical axis names, on one mesh.

    Implements `jaxcl.models.axes.Constraints`: pass it to `constraints(...)` around the traced code.
    """

    def __init__(self, mesh: Mesh, rules: Rules = ACTIVATION_RULES) -> None:
        self.mesh = mesh
        self.rules = rules

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        """Constrains the sharding of `x`; an axis whose size is not divisible is not split."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(names, x.shape)))

    def shards(self, name: str) -> int:
        """Number of parts that the logical axis `name` is split into if its size is divisible."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.get(name, ()))

    def per_shard(self, function: Callable[..., Any], inputs: Sequence[Names], output: Names) -> Callable[..., Any]:
        """`function`, applied on every device to its part of the arguments.

        Args:
          function: takes as many arrays as `inputs` has entries and returns one array; sees local sizes.
          inputs: axis names of each argument.
          output: axis names of the result.
        """

        def sharded(*arrays: jax.Array) -> Any:
            sizes: dict[str, int] = {}
            for names, array in zip(inputs, arrays, strict=True):
                sizes.update({name: size for name, size in zip(names, array.shape, strict=True) if name is not None})
            specs = [self._spec(names, array.shape) for names, array in zip(inputs, arrays, strict=True)]
            # The result's sizes are those of the arguments; an axis that only the result has cannot be split.
            shape = [sizes.get(name or "", 1) for name in output]
            result = self._spec(tuple(name if name in sizes else None for name in output), shape)
            return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(specs), out_specs=result, check_vma=False)(
                *arrays
            )

        return sharded

    def _spec(self, names: Names, shape: Sequence[int]) -> PartitionSpec:
        whole = tuple(
            None if name is None or name not in self.rules or size % self.shards(name) else name
            for name, size in zip(names, shape, strict=True)
        )
        return partition(whole, shape, self.mesh, self.rules, "activation")


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _label(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> str:
    return ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


_noted: set[str] = set()


def _note(message: str) -> None:
    """Logs each message once: the same axis occurs in many arrays."""
    if message not in _noted:
        _noted.add(message)
        logger.info(message)
