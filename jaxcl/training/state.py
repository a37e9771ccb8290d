"""The state that a run carries from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxcl.sharding.layout import Layout, put
from jaxcl.training.schedule import Clock


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Input and output of a step, and the content of a checkpoint.

    A step donates it: after `new, metrics = step(old, batch)` the arrays of `old` are deleted.

    Attributes:
      step: optimizer steps done in the whole run, int32.
      clock: position within the task.
      params: the model's params.
      opt_state: state of the method's optimizer.
      method_state: state of the method.
      low_bits: what bfloat16 leaves out of the trained params, int16; empty if none is bfloat16. See `low_bits`.
    """

    step: Int[Array, ""]
    clock: Clock
    params: PyTree
    opt_state: PyTree
    method_state: PyTree
    low_bits: PyTree = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def state_shardings(state: TrainState, layout: Layout) -> TrainState:
    """The sharding of every array of a state.

    Args:
      state: a state of arrays or of shapes.
      layout: the run's layout.

    Returns:
      The same tree with `NamedSharding` leaves: params, and copies of them in the optimizer's and the method's state,
      are sharded as the layout says; everything else is replicated.
    """
    whole: Any = layout.replicated
    return TrainState(
        step=whole,
        clock=jax.tree.map(lambda _: whole, state.clock),
        params=layout.params,
        opt_state=layout.like_params(state.opt_state),
        method_state=layout.like_params(state.method_state),
        low_bits=layout.like_params(state.low_bits),
    )


def offloaded(shapes: TrainState, shardings: TrainState, names: Sequence[str]) -> TrainState:
    """The shardings, with those in host memory that only the optimizer reads; those of scalars stay on the devices.

    Args:
      shapes: a state of arrays or of shapes.
      shardings: see `state_shardings`.
      names: `Method.offloaded`.
    """

    def wait(shapes: PyTree, shardings: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf, one: one.with_memory_kind("pinned_host") if leaf.ndim else one, shapes, shardings
        )

    own = shardings.method_state
    if names:
        own = {**own, **{name: wait(shapes.method_state[name], own[name]) for name in names}}
    opt_state, low_bits = wait((shapes.opt_state, shapes.low_bits), (shardings.opt_state, shardings.low_bits))
    return shardings.replace(opt_state=opt_state, low_bits=low_bits, method_state=own)


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of a tree, with shardings: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def replace_method_state(state: TrainState, new: PyTree, shardings: PyTree) -> TrainState:
    """The state with the method state that `Method.prepare` or `Method.consolidate` returned.

    Args:
      state: the state before.
      new: the method's new state.
      shardings: where its arrays belong.

    Raises:
      ValueError: structure, a shape or a dtype differs from before; the message names the leaf.
    """
    new = check_replacement("method state", state.method_state, new, shared_with=state.params)
    return state.replace(method_state=put(new, shardings))


def replace_params(state: TrainState, new: PyTree, layout: Layout) -> TrainState:
    """The state with the params that `Method.final_params` returned, sharded.

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
        # A step donates params and method state, so they must not share a buffer.
        return jnp.copy(after) if id(after) in others else after

    return jax.tree_util.tree_map_with_path(check, old, new)
