r"""Learning without forgetting: the model before a task teaches the model that learns it, on the task's own inputs.

Li & Hoiem, ECCV 2016 (arXiv 1606.09282). No earlier example is kept. With the previous model's distribution at
temperature $T$, $p^{1/T} / \sum p^{1/T}$, as teacher and the same of the model at hand as student, the loss is
cross-entropy plus $\lambda\, KL(\text{teacher} \,\|\, \text{student})$ at every scored position. (The paper writes the
cross-entropy of the two, which differs by the teacher's entropy: a constant without gradient.) As in the paper there is
no factor $T^2$. Language models have one output layer for all tasks, so the paper's separate heads and its warm-up of
the new one fall away. The baseline that DAS calls KD is a relative: its code compares hidden states, not outputs.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array
from pydantic import Field

from jaxcl.functional.distillation import full_divergence
from jaxcl.functional.losses import chunked_token_losses, gated_losses, over_positions, scored_states
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.losses import router_terms
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import overlay, trained


class LwfOptions(MethodOptions):
    """Options of `lwf`; the defaults are the paper's."""

    weight: float = Field(1.0, ge=0, description="factor on the divergence from the previous model")
    teacher: Literal["before", "start"] = Field(
        "before",
        description="who teaches; before: the model before the task at hand; start: that before the first task, during "
        "all tasks: what it knew in general is held, without any of its data",
    )
    temperature: float = Field(2.0, gt=0, description="T: both distributions are softened by it")


class Lwf(Method[LwfOptions]):
    """Distils the previous model's outputs on the new task's inputs.

    State: `teacher`, the trained params before the task at hand or before all (their memory once more); `learned`, the
    number of tasks that the teacher has learned, 0 for one that is not run.
    """

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"teacher": trained(params), "learned": jnp.int32(0)}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """The model as it is becomes the teacher, unless that is the one before the first task."""
        if self.options.teacher == "start":
            return state if task.index > 0 else {"teacher": trained(params), "learned": jnp.int32(1)}
        return {"teacher": trained(params), "learned": jnp.int32(task.index)}

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss and divergence from the teacher; the latter has count 0 during the first task."""
        network, temperature, chunk = self.network, self.options.temperature, self.options.loss_chunk
        gate = self.options.loss_gate
        hidden = network.hidden(params, batch, dropout_key=key)
        states = scored_states(hidden.states, batch.predict)
        teacher = overlay(params, state["teacher"])

        def alone(states: Array) -> tuple[Array, Array]:
            logits = functools.partial(network.logits, params)
            losses_alone = chunked_token_losses(logits, states, batch.targets, chunk, gate)
            return losses_alone, jnp.zeros_like(losses_alone)

        def taught(states: Array) -> tuple[Array, Array]:
            def scores(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
                logits = network.logits(params, part[0])
                softened = jax.nn.log_softmax(network.logits(teacher, part[1]) / temperature, axis=-1)
                return gated_losses(logits, part[2], gate), full_divergence(softened, logits / temperature)

            known = scored_states(network.hidden(teacher, batch).states, batch.predict)
            return over_positions(scores, (states, known, batch.targets), chunk)

        has_teacher = state["learned"] > 0
        losses, divergences = jax.lax.cond(has_teacher, taught, alone, states)
        count = jnp.sum(batch.weights)
        return {
            "loss": Term(jnp.sum(losses * batch.weights), count),
            "distillation": Term(jnp.sum(divergences * batch.weights), count * has_teacher, self.options.weight),
            **router_terms(network, hidden, batch),
        }
