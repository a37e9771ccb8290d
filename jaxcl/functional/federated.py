r"""What a server makes of its clients' params: federated averaging, with any optimizer and with privacy.

In a round every client trains from the server's params $\theta$ to its own $\theta_k$. With weights $w_k$ that sum to
1, the server takes

$$g = -\sum_k w_k (\theta_k - \theta) = \theta - \bar\theta, \qquad \bar\theta = \sum_k w_k \theta_k,$$

for a gradient of $\theta$ and gives it to an optimizer (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 1).
Gradient descent with learning rate 1 is federated averaging (McMahan et al., AISTATS 2017, arXiv 1602.05629).

Clients that drift apart: `jaxcl.functional.client_drift`. Sums that hide what each client sent:
`jaxcl.functional.secure_sum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxcl.functional.norm import global_norm

Combine = Literal["mean", "maximum"]

# How far rounding may lift the norm of an update that its client has clipped.
_ROUNDING = 1e-5


class ClientMean(NamedTuple):
    """A running weighted mean over clients, so that only one client's arrays are needed at a time.

    The mean of one client is what it sent, to the bit. With several, the order matters within rounding: add clients in
    a fixed order for results that can be repeated.

    Attributes:
      mean: the mean so far, float32.
      weight: sum of the weights so far.
    """

    mean: PyTree
    weight: Float[Array, ""]

    @classmethod
    def zero(cls, tree: PyTree) -> ClientMean:
        """No client yet; `tree` gives structure and shapes."""
        return cls(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree), jnp.float32(0))

    def add(self, tree: PyTree, weight: Float[Array, ""] | float) -> ClientMean:
        """With another client's arrays.

        Args:
          tree: its arrays.
          weight: its weight, above 0: its number of examples, for example.

        Examples:
          >>> found = ClientMean.zero(jnp.float32(0)).add(jnp.float32(2), 1).add(jnp.float32(6), 3)
          >>> found.mean.item(), found.weight.item()
          (5.0, 4.0)
        """
        total = self.weight + weight
        share = weight / total

        def moved(mean: Array, leaf: Array) -> Array:
            leaf = leaf.astype(jnp.float32)
            return jnp.where(self.weight == 0, leaf, mean + share * (leaf - mean))

        return ClientMean(jax.tree.map(moved, self.mean, tree), total)


def combine_shared(shared: Sequence[PyTree], weights: Sequence[float], how: Combine) -> PyTree:
    """One tree of those that several clients sent; the dtypes are theirs.

    Args:
      shared: a tree per client.
      weights: a weight per client, above 0; a maximum does not use them.
      how: `mean`: the weighted mean; `maximum`: the largest of each entry.

    Raises:
      ValueError: there is no client.

    Examples:
      >>> clients = [jnp.array([1.0, 6.0]), jnp.array([3.0, 0.0])]
      >>> combine_shared(clients, [1, 1], "mean").tolist(), combine_shared(clients, [1, 1], "maximum").tolist()
      ([2.0, 3.0], [3.0, 6.0])
    """
    if not shared:
        raise ValueError("shared: expected a tree per client, got none")
    if how == "maximum":
        return jax.tree.map(lambda *leaves: jnp.max(jnp.stack(leaves), axis=0), *shared)
    found = ClientMean.zero(shared[0])
    for tree, weight in zip(shared, weights, strict=True):
        found = found.add(tree, weight)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found.mean, shared[0])


# The server


def pseudo_gradient(params: PyTree, mean: PyTree) -> PyTree:
    """`params - mean`, float32: minus the weighted mean of the clients' updates.

    Args:
      params: the params that the round began with.
      mean: the weighted mean of the params that clients ended with.
    """
    return jax.tree.map(lambda leaf, mean: leaf.astype(jnp.float32) - mean.astype(jnp.float32), params, mean)


def server_step(
    optimizer: optax.GradientTransformation, state: PyTree, params: PyTree, mean: PyTree
) -> tuple[PyTree, PyTree]:
    """The server's params after a round, and the state of its optimizer.

    The optimizer's update is written as a departure from the mean. Where it leads to the mean, as `optax.sgd(1.0)`
    does, the result is the mean to the bit, which `params - (params - mean)` is not in floating point.

    Args:
      optimizer: any optimizer with its learning rate, such as `optax.sgd(1.0)` or `adaptive_server`.
      state: its state, `optimizer.init(params)` at first.
      params: the params that the round began with.
      mean: the weighted mean of the params that clients ended with.

    Examples:
      >>> params, mean = jnp.array([1.0]), jnp.array([3.0])
      >>> half = optax.sgd(0.5)
      >>> server_step(half, half.init(params), params, mean)[0].tolist()
      [2.0]
    """
    gradient = pseudo_gradient(params, mean)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    updates, state = optimizer.update(gradient, state, wide)

    def moved(param: Array, mean: Array, gradient: Array, update: Array) -> Array:
        rest = update + gradient
        # Adding 0 would change the sign of -0.0.
        return jnp.where(rest == 0, mean.astype(jnp.float32), mean + rest).astype(param.dtype)

    return jax.tree.map(moved, params, mean, gradient, updates), state


class AdaptiveServer(NamedTuple):
    """State of `adaptive_server`.

    Attributes:
      mean: running mean of gradients.
      square: running sum or mean of their squares.
    """

    mean: PyTree
    square: PyTree


def adaptive_server(
    rule: Literal["adagrad", "adam", "yogi"], learning_rate: float, *, b1: float, b2: float, adaptivity: float
) -> optax.GradientTransformation:
    r"""FedAdagrad, FedAdam and FedYogi (Reddi et al., 2021, algorithm 2).

    $m \leftarrow \beta_1 m + (1 - \beta_1) g$, and the update is $-\eta\, m / (\sqrt v + \tau)$, where $v$ begins with
    $\tau^2$ and becomes $v + g^2$ (adagrad), $\beta_2 v + (1 - \beta_2) g^2$ (adam) or
    $v - (1 - \beta_2)\, g^2 \operatorname{sign}(v - g^2)$ (yogi).

    Unlike optax's `adam` and `yogi`, and as in the paper, $m$ and $v$ are not corrected for where they begin.

    Args:
      rule: which of the three.
      learning_rate: eta.
      b1: beta_1, in [0, 1).
      b2: beta_2, in [0, 1); `adagrad` does not use it.
      adaptivity: tau, above 0; the smaller, the more entries with small gradients are moved.
    """

    def init(params: PyTree) -> AdaptiveServer:
        def filled(value: float) -> PyTree:
            return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, jnp.float32), params)

        return AdaptiveServer(filled(0.0), filled(adaptivity**2))

    def grown(square: Array, leaf: Array) -> Array:
        new = jnp.square(leaf)
        if rule == "adagrad":
            return square + new
        if rule == "adam":
            return b2 * square + (1 - b2) * new
        return square - (1 - b2) * new * jnp.sign(square - new)

    def update(gradient: PyTree, state: AdaptiveServer, params: PyTree = None) -> tuple[PyTree, AdaptiveServer]:
        mean = jax.tree.map(lambda old, leaf: b1 * old + (1 - b1) * leaf, state.mean, gradient)
        square = jax.tree.map(grown, state.square, gradient)
        updates = jax.tree.map(
            lambda mean, square: -learning_rate * mean / (jnp.sqrt(square) + adaptivity), mean, square
        )
        return updates, AdaptiveServer(mean, square)

    return optax.GradientTransformation(init, update)


# Privacy of clients


def clip_update(update: PyTree, limit: float) -> tuple[PyTree, Float[Array, ""]]:
    """An update whose norm is at most `limit`, and the norm that it had (McMahan et al., 2018, flat clipping).

    An update within the limit keeps its bits.

    Args:
      update: what a client adds to the server's params.
      limit: largest Euclidean norm over all leaves, above 0.

    Examples:
      >>> clipped, norm = clip_update(jnp.array([3.0, 4.0]), 1.0)
      >>> [f"{value:.2f}" for value in clipped], norm.item()
      (['0.60', '0.80'], 5.0)
    """
    norm = global_norm(update)
    return jax.tree.map(lambda leaf: leaf * (limit / jnp.maximum(norm, limit)).astype(leaf.dtype), update), norm


def noised_mean(total: PyTree, key: Array, *, limit: float, noise_multiplier: float, clients: float) -> PyTree:
    r"""The mean of clipped updates with noise that hides any one client (DP-FedAvg, McMahan et al., ICLR 2018).

    $\frac{1}{m} (\sum_k \Delta_k + \mathcal{N}(0, (z C)^2))$ (arXiv 1710.06963, algorithm 1 with equal weights):
    weights that follow from data would themselves have to be hidden. The mean is over the $m$ clients that a round is
    expected to have, not over those it had, which would then be known as well.

    Args:
      total: sum of the updates, each clipped to `limit`.
      key: of the noise; a new one per round.
      limit: C.
      noise_multiplier: z; 0: no noise.
      clients: m, the expected number of clients in a round.
    """
    noise = optax.tree.random_like(key, total, sampler=jax.random.normal)
    return jax.tree.map(lambda leaf, random: (leaf + noise_multiplier * limit * random) / clients, total, noise)


def why_refused(update: PyTree, expected: PyTree, limit: float | None = None) -> str | None:
    """Why what a client sent cannot be used; `None` if it can. On the host, not traced.

    Args:
      update: what it sent: a tree of arrays.
      expected: a tree with the structure and shapes that it has to have.
      limit: largest norm over all leaves, where clients have to clip; none: any.

    Examples:
      >>> why_refused({"a": np.ones(2)}, {"a": np.ones(3)})
      'a: expected shape (3,), got (2,)'
      >>> why_refused({"a": np.array([1.0, np.nan])}, {"a": np.ones(2)})
      'a: not finite'
    """
    found, wanted = _by_name(update), _by_name(expected)
    if list(found) != list(wanted):
        other = sorted(found.keys() ^ wanted.keys())
        return f"expected the arrays of another model: {', '.join(other[:3])} {'differ' if other[1:] else 'differs'}"
    square = 0.0
    for name, leaf in found.items():
        if leaf.shape != wanted[name].shape:
            return f"{name}: expected shape {wanted[name].shape}, got {leaf.shape}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"{name}: expected floats, got {leaf.dtype}"
        wide = np.asarray(leaf, np.float64)
        if not np.isfinite(wide).all():
            return f"{name}: not finite"
        square += float(np.sum(np.square(wide)))
    if limit is not None and np.sqrt(square) > limit * (1 + _ROUNDING):
        return f"norm {np.sqrt(square):.6g} is over the limit {limit:g}"
    return None


def _by_name(tree: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
