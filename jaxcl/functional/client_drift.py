r"""Clients with different data that stay together while they train: FedProx and SCAFFOLD.

Both are optax transformations that come first in a client's optimizer, before the gradient is clipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


class Proximal(NamedTuple):
    """State of `proximal`.

    Attributes:
      centre: the params that the round began with.
    """

    centre: PyTree


def proximal(strength: float) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of $\frac{\mu}{2} \lVert \theta - \theta_0 \rVert^2$ (FedProx).

    Li et al., MLSys 2020 (arXiv 1812.06127), equation 2. The centre $\theta_0$ is the params that the state was made
    from: every round begins with `init`, or with `start_proximal` where it is a part of an optimizer whose state stays.

    Args:
      strength: mu, at least 0; 0 changes no bit of a gradient.

    Examples:
      >>> near = proximal(0.5)
      >>> near.update(jnp.array(1.0), near.init(jnp.array(2.0)), jnp.array(6.0))[0].item()
      3.0
    """

    def update(gradient: PyTree, state: Proximal, params: PyTree, **_: Any) -> tuple[PyTree, Proximal]:
        if strength == 0:
            return gradient, state
        added = jax.tree.map(
            lambda leaf, param, centre: leaf + strength * (param - centre), gradient, params, state.centre
        )
        return added, state

    return optax.GradientTransformationExtraArgs(start_proximal, update)


def start_proximal(params: PyTree) -> Proximal:
    """The state at the start of a round that begins with `params`."""
    return Proximal(jax.tree.map(jnp.copy, params))


class Scaffold(NamedTuple):
    """State of `scaffold`: what a client keeps from round to round, and what it gathers within one.

    Attributes:
      own: the client's control variate `c_i`.
      common: the server's control variate `c`.
      total: sum of the client's gradients in this round.
      steps: how many.
    """

    own: PyTree
    common: PyTree
    total: PyTree
    steps: Int[Array, ""]


def scaffold() -> optax.GradientTransformationExtraArgs:
    r"""Gradients corrected by control variates, $g + c - c_i$ (SCAFFOLD).

    Karimireddy et al., ICML 2020 (arXiv 1910.06378, algorithm 1). After a round the client's variate is the mean of its
    own gradients in that round. For gradient descent with a constant rate this is the paper's option II,
    $c_i - c + (\theta - \theta_i) / (K \eta)$, and it needs no learning rate, so that any optimizer can follow.

    A round is `start_scaffold`, the client's steps, `finish_scaffold`; then the server's `common_variate`.
    """

    def init(params: PyTree) -> Scaffold:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return Scaffold(zeros, zeros, zeros, jnp.int32(0))

    def update(gradient: PyTree, state: Scaffold, params: PyTree = None, **_: Any) -> tuple[PyTree, Scaffold]:
        total = jax.tree.map(jnp.add, state.total, gradient)
        corrected = jax.tree.map(lambda leaf, own, common: leaf + (common - own), gradient, state.own, state.common)
        return corrected, state._replace(total=total, steps=state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def start_scaffold(state: Scaffold, common: PyTree) -> Scaffold:
    """The state at the start of a round.

    Args:
      state: the client's state after its last round, or `scaffold().init(params)`.
      common: the server's control variate.
    """
    return Scaffold(state.own, common, jax.tree.map(jnp.zeros_like, state.total), jnp.int32(0))


def finish_scaffold(state: Scaffold) -> tuple[Scaffold, PyTree]:
    """The state after a round, and by how much the client's control variate changed: what it sends besides params.

    Without a step, nothing changes.

    >>> variates = scaffold()
    >>> state = variates.init(jnp.array(0.0))
    >>> for gradient in (1.0, 3.0):
    ...     _, state = variates.update(jnp.array(gradient), state)
    >>> finish_scaffold(state)[1].item()
    2.0
    """
    steps = state.steps.astype(jnp.float32)
    mean = jax.tree.map(
        lambda total, own: jnp.where(steps == 0, own, total / jnp.maximum(steps, 1.0)), state.total, state.own
    )
    return state._replace(own=mean), jax.tree.map(jnp.subtract, mean, state.own)


def common_variate(common: PyTree, change: PyTree, share: Float[Array, ""] | float) -> PyTree:
    """The server's control variate after a round: that of all clients remains the weighted mean of their own.

    Args:
      common: before the round.
      change: weighted mean of the changes that clients sent.
      share: weight of these clients, as a share of that of all clients, in (0, 1].
    """
    return jax.tree.map(lambda before, change: before + share * change, common, change)
