r"""O-LoRA: every task learns in directions of its own (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

A task trains a fresh low-rank adapter; those of earlier tasks are frozen and stay in effect. A penalty keeps the
directions that the new adapter reads away from those of the earlier ones (section 3, with the paper's A written as the
side of the inputs): $\lambda_1 \sum_{i<t} \sum_{j,k} |O_{i,t}[j, k]|^2$ with $O_{i,t} = A_i^\top A_t$, added over all
projections that have an adapter. No example is kept and no task need be known afterwards.

After a task its adapter is added to the weights, as the paper does when all are learned: the network computes the same,
and its size and cost do not grow with the tasks. Of each adapter only `lora_a` is kept, for the penalty.

The authors' code takes absolute values for squares; the paper is followed. Their further penalty on the size of the new
adapter, which the paper leaves out, is left out here too.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.models.batch import Batch
from jaxcl.models.lora import adapted, fold, stacked
from jaxcl.models.network import ModelConfig
from jaxcl.models.trainable import overlay

Directions = dict[str, Array]


class OloraOptions(MethodOptions):
    """Options of `olora`; adapters are described in `model.lora`."""

    orthogonality: float = Field(
        0.5, ge=0, description="lambda_1: weight of the overlap with the adapters of earlier tasks"
    )


class Olora(Method[OloraOptions]):
    """A fresh adapter per task, orthogonal to the earlier ones; needs `model.lora`.

    State: `past`, by path of the projection, the `lora_a` of every task `[tasks, layers, inputs.., rank]`, zeros for
    tasks to come.
    """

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        if model.lora is None:
            raise ValueError("name: olora trains adapters and the model has none; set model.lora, such as its rank")
        if model.quantise != "none":
            raise ValueError(
                "name: olora adds adapters to the weights, which have no room for them in few bits; set "
                f"model.quantise=none, got {model.quantise}"
            )

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        return {"past": {path: jnp.zeros((self.num_tasks, *a.shape)) for path, a in _directions(params).items()}}

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss and overlap with earlier tasks."""
        terms = dict(super().loss(params, state, batch, key))
        overlaps = [overlap(a, state["past"][path]) for path, a in _directions(params).items()]
        terms["orthogonality"] = Term(sum(overlaps, jnp.float32(0)), jnp.float32(1), self.options.orthogonality)
        return terms

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """Keeps the task's directions."""
        return task.compile(self.keep)(state, _directions(params), jnp.int32(task.index))

    def final_params(self, params: Params, state: State, task: Task) -> Params:
        """Adds the task's adapter to the weights, and starts the next one."""
        return overlay(params, task.compile(self.fold)(params, task.key))

    def keep(self, state: State, directions: Directions, index: Array) -> State:
        """Takes the directions of task `index` into the state; pure."""
        return {"past": {path: past.at[index].set(directions[path]) for path, past in state["past"].items()}}

    def fold(self, params: Params, key: Array) -> Params:
        """See `jaxcl.models.lora.fold`; pure."""
        assert self.network.config.lora is not None  # see `check`
        return fold(params, self.network.config.lora, key)


def overlap(a: Float[Array, "layers ... rank"], past: Float[Array, "tasks layers ... rank"]) -> Float[Array, ""]:
    """Sum over tasks and layers of the squared products of every direction with every earlier one."""
    layers, rank = a.shape[0], a.shape[-1]
    a, past = a.reshape(layers, -1, rank), past.reshape(len(past), layers, -1, rank)
    return jnp.sum(jnp.square(jnp.einsum("tlij,lik->tljk", past, a)))


def _directions(params: Params) -> Directions:
    """By path of the projection, the first factor of its adapter, with an axis of layers."""
    return {path: leaves["lora_a"] if stacked(leaves) else leaves["lora_a"][None] for path, leaves in adapted(params)}
