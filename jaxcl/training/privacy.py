r"""Differentially private training: each example's gradient is clipped, noise is added to their sum (DP-SGD).

Abadi et al., CCS 2016 (arXiv 1607.00133), algorithm 1, with optax's clipping: with the gradients $g_n$ of a batch of
$B$ examples, clip $C$ and noise multiplier $\sigma$, the optimizer sees
$\frac{1}{B} (\sum_n g_n \min(1, C / \lVert g_n \rVert) + \sigma C \, \mathcal{N}(0, I))$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from pydantic import Field

from jaxcl.errors import UserError
from jaxcl.methods.base import Method, Terms
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import trained
from jaxcl.schema import Schema
from jaxcl.sharding.layout import Layout
from jaxcl.training.micro_batches import micro_batches


class PrivacyConfig(Schema):
    """Noise on the gradients, so that the model reveals next to nothing about any single example."""

    clip: float = Field(gt=0, description="maximal norm of an example's gradient")
    noise_multiplier: float = Field(ge=0, description="standard deviation of the noise, in multiples of clip; 0: none")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta for which epsilon is reported; well below 1 / examples")


def check_private(method: Method, name: str) -> None:
    """Checks that a method can be trained privately.

    Raises:
      UserError: it keeps earlier examples, or its loss compares examples with each other.
    """
    if method.couples_examples:
        raise UserError(
            f"training.privacy: the loss of {name} compares the examples of a batch with each other, so that no "
            "example has a gradient of its own; docs/methods.md says what can be trained privately",
            exit_code=2,
        )
    if (method.replay is not None and method.replay.source == "kept") or method.joint:
        raise UserError(
            f"training.privacy: {name} trains on examples of earlier tasks again, which epsilon does not account for; "
            "allowed: methods that keep none, or method.replay.source=synthetic",
            exit_code=2,
        )


def private_gradient(config: PrivacyConfig, accumulate: int, layout: Layout) -> Callable[..., Any]:
    r"""The noised mean of clipped gradients, which replaces the plain gradient in the step.

    An example's gradient is that of its own loss, $\sum_i w_i s_i / c_i$ over the method's terms with sum and count of
    this example alone. Per-example gradients exist for one of `accumulate` micro-batches at a time.

    Returns:
      `gradient(loss, params, batch, key) -> ((total, means), gradient)`: totals and means over the examples.
    """

    def gradient(
        loss: Callable[..., Terms], params: PyTree, batch: Batch, key: Array
    ) -> tuple[tuple[Array, Mapping[str, Array]], PyTree]:
        noise_key, loss_key = jax.random.split(key)

        def of_example(params: PyTree, row: Batch, key: Array) -> tuple[Array, Mapping[str, Array]]:
            terms = loss(params, jax.tree.map(lambda leaf: leaf[None], row), key)
            means = {name: term.sum / jnp.where(term.count == 0, 1.0, term.count) for name, term in terms.items()}
            return sum((terms[name].weight * mean for name, mean in means.items()), jnp.float32(0)), means

        def add(total: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, Any]:
            rows, key = part
            keys = jax.random.split(key, rows.size)
            results, grads = jax.vmap(jax.value_and_grad(of_example, has_aux=True), (None, 0, 0))(params, rows, keys)
            grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
            clipped, _ = optax.per_example_global_norm_clip(grads, config.clip)
            total = jax.tree.map(jnp.add, total, clipped)
            return jax.lax.with_sharding_constraint(total, trained(layout.params)), jax.tree.map(jnp.sum, results)

        parts = micro_batches(batch, accumulate), jax.random.split(loss_key, accumulate)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        summed, results = jax.lax.scan(add, zeros, parts)
        noise = optax.tree.random_like(noise_key, zeros, sampler=jax.random.normal)
        scale = config.clip * config.noise_multiplier
        mean = jax.tree.map(lambda leaf, random: (leaf + scale * random) / batch.size, summed, noise)
        return jax.tree.map(lambda leaf: jnp.sum(leaf) / batch.size, results), mean

    return gradient


def spent(config: PrivacyConfig, *, steps: int, steps_per_epoch: int, rewinds: int = 0) -> dict[str, float]:
    """What training on a task reveals about one of its examples.

    That a step was skipped, because its loss or gradient was not finite, is itself a fact about its examples that no
    noise hides. It is not accounted for.

    Args:
      config: the privacy section.
      steps: optimizer steps of the task, with those that were skipped, and those before the task went back to a
        checkpoint.
      steps_per_epoch: steps in which each example appears once.
      rewinds: how often it went back. The order changes then, within an epoch: an example may come up to two times
        more than epochs of these steps begin.

    Returns:
      `epsilon`: of one Gaussian mechanism per step with the example, which is one per epoch in an order that depends on
      seed and lengths only; for data that differ in one example, replaced by a blank one of the same length.
      `epsilon_poisson`: as usually reported, as if each step drew its examples independently. Both are infinite without
      noise.

    Raises:
      UserError: `dp-accounting` is not installed.
    """
    sigma, delta = config.noise_multiplier, config.delta
    seen = math.ceil(steps / steps_per_epoch) + 2 * rewinds
    return {
        "epsilon": gaussian_epsilon(sigma, delta, seen),
        "epsilon_poisson": gaussian_epsilon(sigma, delta, steps, sampled=min(1.0, 1 / steps_per_epoch)),
    }


def gaussian_epsilon(noise_multiplier: float, delta: float, times: int, *, sampled: float | None = None) -> float:
    """Epsilon of Gaussian mechanisms one after another; infinite without noise.

    Args:
      noise_multiplier: standard deviation of the noise, in multiples of what one record can change.
      delta: the delta that epsilon is for.
      times: number of mechanisms.
      sampled: probability that a record is in a mechanism, drawn anew for each and kept secret; `None`: it is in all.

    Raises:
      UserError: `dp-accounting` is not installed.
    """
    if times == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        from dp_accounting import dp_event
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise UserError("privacy: pip install 'jaxcl[dp]' (dp-accounting) to account for epsilon") from None
    event: Any = dp_event.GaussianDpEvent(noise_multiplier)
    if sampled is not None:
        event = dp_event.PoissonSampledDpEvent(sampled, event)
    return float(RdpAccountant().compose(dp_event.SelfComposedDpEvent(event, times)).get_epsilon(delta))
