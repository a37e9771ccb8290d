r"""Elastic weight consolidation: params that mattered are kept near where they were.

Kirkpatrick et al., PNAS 2017 (arXiv 1612.00796, equation 3), in the online form of Schwarz et al., ICML 2018 (arXiv
1805.06370): one anchor and one running Fisher for all earlier tasks instead of a pair per task. After a task the anchor
moves to its params $\theta^*$, and the diagonal Fisher becomes $F \leftarrow \gamma F + F_t$; while the next task is
learned,

$$\text{loss} + \frac{\lambda}{2} \sum_p F_p (\theta_p - \theta^*_p)^2.$$

$F_t$ is the empirical Fisher: the squared gradient of an example's own loss on its true labels, averaged over
examples. It is exact: gradients are squared one example at a time, never those of a batch's mean. The loss of an
example is its mean over its scored tokens, the unit that training minimises; the factor $\gamma$ that the online form
puts before its penalty is part of $\lambda$.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array
from pydantic import Field

from jaxcl.functional.fisher import FisherSums, quadratic_penalty
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.squares import add_row_squares
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import trained


class EwcOptions(MethodOptions):
    """Options of `ewc`."""

    strength: float = Field(
        1000.0, ge=0, description="lambda: factor on half the Fisher-weighted squared distance to the anchor"
    )
    decay: float = Field(
        1.0, ge=0, le=1, description="gamma: share of the Fisher of earlier tasks that is left after another task"
    )
    fisher_examples: int = Field(1000, gt=0, description="examples of a task that its Fisher is measured on")


class Ewc(Method[EwcOptions]):
    """Pulls params back to where the last task left them, by their Fisher information.

    State: `anchor`, the trained params after the last task; `fisher`, float32, 0 before the first one. That is twice
    their memory, and once more while a Fisher is measured.
    """

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"anchor": trained(params), "fisher": FisherSums.zero(trained(params)).total}

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss and the penalty."""
        with jax.named_scope("penalty"):
            penalty = quadratic_penalty(trained(params), state["anchor"], state["fisher"])
        term = Term(penalty, jnp.float32(1), 0.5 * self.options.strength)
        return {**super().loss(params, state, batch, key), "penalty": term}

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """Measures the task's Fisher, and moves the anchor."""
        add = task.compile(self.add_fisher)
        start = task.compile(self.no_fisher)(params)
        sums = task.fold(lambda sums, batch: add(sums, params, batch), start, limit=self.options.fisher_examples)
        return task.compile(self.update_state)(state, params, sums)

    def share(self, state: State) -> State:
        """The Fisher; the anchor is the server's params, which all clients have.

        A Fisher is a mean over examples. Weighted by their number, the clients' mean is that of all examples together.
        """
        return {"fisher": state["fisher"]}

    def no_fisher(self, params: Params) -> FisherSums:
        """No example yet; pure."""
        return FisherSums.zero(trained(params))

    def add_fisher(self, sums: FisherSums, params: Params, batch: Batch) -> FisherSums:
        """Adds a batch's squared per-example gradients; pure. See `add_row_squares`."""
        total = add_row_squares(self.network, sums.total, params, batch, self.options.loss_chunk)
        real = jnp.sum(jnp.any(batch.weights > 0, axis=1).astype(jnp.float32))
        return FisherSums(total, sums.examples + real)

    def update_state(self, state: State, params: Params, sums: FisherSums) -> State:
        """Takes a finished measurement into the state; pure."""
        fisher = jax.tree.map(lambda before, now: self.options.decay * before + now, state["fisher"], sums.mean())
        return {"anchor": trained(params), "fisher": fisher}
