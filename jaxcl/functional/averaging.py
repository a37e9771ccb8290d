r"""Averages of params over a task's steps, or with the params before it: a remedy that any method can take along.

With $\theta_s$ the params at the start of the task and $r$ a rate,

- `ema`: $\bar\theta \leftarrow (1 - r) \bar\theta + r \theta$ after every step, from $\theta_s$; the task ends with
  $\bar\theta$;
- `wise` (Wortsman et al., 2021, arXiv 2109.01903): the task ends with $\theta_s + r (\theta - \theta_s)$;
- `sfa` (Kleiman et al., 2025, arXiv 2501.05559): every `every` steps $\theta \leftarrow r \theta_s + (1 - r) \theta$.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

Average = Literal["ema", "wise", "sfa"]


class Averaged(NamedTuple):
    """State of `averaged`.

    Attributes:
      inner: state of the optimizer.
      reference: the running mean (`ema`), or the params at the start of the task.
      steps: steps since the start of the task.
    """

    inner: PyTree
    reference: PyTree
    steps: Int[Array, ""]


def averaged(
    optimizer: optax.GradientTransformation, how: Average, rate: float, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps what `finish_average` needs; `sfa` also changes its updates.

    Its state is that of a task: see `restart_average`.

    Args:
      optimizer: what makes the updates.
      how: see the module.
      rate: r.
      every: steps from one average to the next, for `sfa`.

    Examples:
      >>> sgd = averaged(optax.sgd(1.0), "sfa", rate=0.5, every=2)
      >>> params = jnp.array(8.0)
      >>> state = sgd.init(params)
      >>> for _ in range(2):
      ...     updates, state = sgd.update(jnp.array(2.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params.item()  # 8 -> 6 -> 4, averaged with 8
      6.0
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Averaged:
        return Averaged(inner.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0))

    def update(updates: PyTree, state: Averaged, params: PyTree, **extra: Any) -> tuple[PyTree, Averaged]:
        updates, kept = inner.update(updates, state.inner, params, **extra)
        steps, reference = state.steps + 1, state.reference

        def moved(mean: Array, old: Array, step: Array) -> Array:
            return mean + rate * (old + step - mean)

        def pulled(start: Array, old: Array, step: Array) -> Array:
            return jnp.where(steps % every == 0, rate * (start - old) + (1 - rate) * step, step)

        if how == "ema":
            reference = jax.tree.map(moved, reference, params, updates)
        if how == "sfa":
            updates = jax.tree.map(pulled, reference, params, updates)
        return updates, Averaged(kept, reference, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def restart_average(state: Averaged, params: PyTree) -> Averaged:
    """The state at the start of another task, which begins with `params`; the optimizer's own state stays."""
    return state._replace(reference=jax.tree.map(jnp.copy, params), steps=jnp.int32(0))


def finish_average(state: Averaged, params: PyTree, how: Average, rate: float) -> PyTree:
    """The params that a task ends with.

    Args:
      state: the optimizer's state after the task's last step.
      params: the params after it.
      how: see the module.
      rate: r.
    """
    if how == "ema":
        return state.reference
    if how == "wise":
        return jax.tree.map(lambda start, now: start + rate * (now - start), state.reference, params)
    return params
