r"""Elastic weight consolidation: params that mattered are held near where they were.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796, equation 3), in the online form of Schwarz et al., ICML 2018 (arXiv
1805.06370): one anchor and one running Fisher for all earlier tasks instead of a pair a task. After a task the anchor
moves to its params $\theta^*$, and the diagonal Fisher becomes $F \leftarrow \gamma F + F_t$; while the next task is
learned,

$$\text{loss} + \frac{\lambda}{2} \sum_p F_p (\theta_p - \theta^*_p)^2.$$

$F_t$ is the empirical Fisher: the squared gradient of an example's own loss on its true labels, averaged over
examples. It is exact: gradients are squared one example at a time, never those of a batch's mean. The loss of an
example is its mean over its scored tokens, the unit that training minimises; the factor $\gamma$ that the online form
puts before its penalty is part of $\lambda$.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.methods.base import Method, MethodConfig, Params, State, Task, Term, Terms
from jaxcl.methods.losses import example_losses
from jaxcl.models.axes import constrain, shards
from jaxcl.models.batch import Batch
from jaxcl.models.lora import overlay, trained
from jaxcl.schema import Schema


class EwcConfig(MethodConfig):
    """Options of `ewc`."""

    strength: float = Field(
        1000.0, ge=0, description="lambda: factor on half the Fisher-weighted squared distance to the anchor"
    )
    decay: float = Field(
        1.0, ge=0, le=1, description="gamma: share of the Fisher of earlier tasks that is left after another task"
    )
    fisher_examples: int = Field(1000, gt=0, description="examples of a task that its Fisher is measured on")


class FisherSums(NamedTuple):
    """A mean over examples in the making.

    Attributes:
      total: sums of squared gradients, the tree of the trained params, float32.
      examples: how many.
    """

    total: Params
    examples: Float[Array, ""]

    def mean(self) -> Params:
        """The diagonal Fisher; 0 where there was no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.examples, 1.0), self.total)


class Ewc(Method):
    """Pulls params back to where the last task left them, by their Fisher information.

    State: `anchor`, the trained params after the last task; `fisher`, float32, 0 before the first one. That is twice
    their memory, and once more while a Fisher is measured.
    """

    Config: ClassVar[type[Schema]] = EwcConfig

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"anchor": trained(params), "fisher": _zeros(trained(params))}

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss and the penalty."""

        def penalty(param: Array, anchor: Array, fisher: Array) -> Array:
            return jnp.sum(fisher * jnp.square(param.astype(jnp.float32) - anchor.astype(jnp.float32)))

        with jax.named_scope("penalty"):
            penalties = jax.tree.map(penalty, trained(params), state["anchor"], state["fisher"])
        term = Term(sum(jax.tree.leaves(penalties), jnp.float32(0)), jnp.float32(1), 0.5 * self.config.strength)
        return {**super().loss(params, state, batch, key), "penalty": term}

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """Measures the task's Fisher, and moves the anchor."""
        add = task.compile(self.add_fisher)
        sums = task.compile(self.no_fisher)(params)
        for batch in task.examples(self.config.fisher_examples):
            sums = add(sums, params, batch)
        return task.compile(self.absorb)(state, params, sums)

    def no_fisher(self, params: Params) -> FisherSums:
        """No example yet; pure."""
        return FisherSums(_zeros(trained(params)), jnp.float32(0))

    @jax.named_scope("importance")
    def add_fisher(self, sums: FisherSums, params: Params, batch: Batch) -> FisherSums:
        """Adds a batch's squared per-example gradients; pure.

        One row a device is worked on at a time: a row's gradient is as large as the trained params. No dropout is
        used; rows without a scored position add nothing.
        """
        ways = shards("batch")

        def loss(part: Params, row: Batch) -> Array:
            single, whole = jax.tree.map(lambda leaf: leaf[None], row), overlay(params, part)
            states = self.network.hidden(whole, single).states
            return example_losses(self.network, whole, states, single, self.config.loss_chunk)[0]

        def split(leaf: Array) -> Array:
            """Part i holds row i of each device, so that no row moves."""
            parts = leaf.reshape(ways, -1, *leaf.shape[1:]).swapaxes(0, 1)
            return constrain(parts, None, "batch", *[None] * (leaf.ndim - 1))

        def add(total: Params, rows: Batch) -> tuple[Params, None]:
            gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(trained(params), rows)
            squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=0), gradients)
            return jax.tree.map(jnp.add, total, squares), None

        total, _ = jax.lax.scan(add, sums.total, jax.tree.map(split, batch))
        real = jnp.sum(jnp.any(batch.weights > 0, axis=1).astype(jnp.float32))
        return FisherSums(total, sums.examples + real)

    def absorb(self, state: State, params: Params, sums: FisherSums) -> State:
        """Takes a finished measurement into the state; pure."""
        fisher = jax.tree.map(lambda before, now: self.config.decay * before + now, state["fisher"], sums.mean())
        return {"anchor": trained(params), "fisher": fisher}


def _zeros(params: Params) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
