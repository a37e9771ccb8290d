"""Everything a run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxcl.sharding.layout import Layout, put
from jaxcl.training.optimizer import Clock


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and gives back, and what a checkpoint holds.

    A step donates it: after `new, metrics = step(old, batch)` the arrays of `old` are gone.

    Attributes:
      step: optimizer steps done in the whole run, int32.
      clock: position within the task.
      params: the model's params.
      opt_state: state of the method's optimizer.
      method_state: state of the method.
    """

    step: Int[Array, ""]
    clock: Clock
    params: PyTree
    opt_state: PyTree
    method_state: PyTree

    def replace(self, **changes: Any) -> TrainState:
        """A copy with other values in the named fields."""
        return dataclasses.replace(self, **changes)


def state_shardings(state: TrainState, layout: Layout) -> TrainState:
    """The sharding of every array of a state.

    Args:
      state: a state of arrays or of shapes.
      layout: the run's layout.

    Returns:
      The same tree with `NamedSharding` leaves: params as the layout says, copies of them in the optimizer's and the
      method's state likewise, all else replicated.
    """
    whole: Any = layout.replicated
    return TrainState(
        step=whole,
        clock=Clock(whole, whole, whole),
        params=layout.params,
        opt_state=layout.like_params(state.opt_state),
        method_state=layout.like_params(state.method_state),
    )


def on_host(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shardings of arrays that wait in the host's memory; single numbers stay on the devices."""
    return jax.tree.map(
        lambda leaf, sharding: sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding, shapes, shardings
    )


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of a tree, with shardings: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def replace_method_state(state: TrainState, new: PyTree, layout: Layout) -> TrainState:
    """A state with what `Method.prepare` or `Method.consolidate` returned, put where it lives.

    Raises:
      ValueError: structure, a shape or a dtype differs from before; the message names the leaf.
    """
    new = check_replacement("method state", state.method_state, new, shared_with=state.params)
    return state.replace(method_state=layout.place(new))


def replace_params(state: TrainState, new: PyTree, layout: Layout) -> TrainState:
    """A state with what `Method.final_params` returned, put where it lives.

    Raises:
      ValueError: structure, a shape or a dtype differs from before; the message names the leaf.
    """
    if new is state.params:
        return state
    new = check_replacement("params", state.params, new, shared_with=state.method_state)
    return state.replace(params=put(new, layout.params))


def check_replacement(name: str, old: PyTree, new: PyTree, shared_with: PyTree = None) -> PyTree:
    """Checks that `new` has the structure, shapes and dtypes of `old`; copies buffers shared with `shared_with`.

    Raises:
      ValueError: structure, a shape or a dtype differs; the message names the leaf.
    """
    origin = {"method state": "Method.init", "params": "the network"}[name]
    expected: Any = jax.tree.structure(old)
    got: Any = jax.tree.structure(new)
    if expected != got:
        raise ValueError(f"{name}: expected structure {expected}, got {got}; {origin} decides it")
    others = {id(leaf) for leaf in jax.tree.leaves(shared_with)}

    def check(path: Any, before: Array, after: Array) -> Array:
        if before.shape != after.shape or before.dtype != after.dtype:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name} {where}: expected {before.dtype}{list(before.shape)}, "
                f"got {after.dtype}{list(after.shape)}; {origin} decides shapes and dtypes"
            )
        # A step donates params and method state: they may not share a buffer.
        return jnp.copy(after) if id(after) in others else after

    return jax.tree_util.tree_map_with_path(check, old, new)
