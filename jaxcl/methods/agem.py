r"""A-GEM: no step may raise the loss of what is remembered.

Chaudhry et al., ICLR 2019 (arXiv 1812.00420). Every step draws a batch from the memory. Where the gradient $g$ of the
task's batch points against the gradient $r$ of the remembered one, $g^\top r < 0$, it is replaced by the nearest one
that does not, $g - \frac{g^\top r}{r^\top r}\, r$ (equation 11). The model never learns from remembered rows
themselves.

As in the paper the product is that of the gradients. Clipping, moments and weight decay come after it, so that with an
optimizer other than plain gradient descent a step may still raise the remembered loss.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from pydantic import Field

from jaxcl.functional.projection import without_conflict
from jaxcl.functional.terms import Terms
from jaxcl.methods.base import Method, OptimizerParts, Params, State
from jaxcl.methods.options import ReplayConfig, ReplayOptions
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import overlay, trained


class AgemReplay(ReplayConfig):
    """How examples of earlier tasks are kept; every step compares its batch with remembered ones."""

    mode: str = Field("mix", pattern="^mix$", description="mix: every step is on a task batch and a memory batch")


class AgemOptions(ReplayOptions):
    """Options of `agem`."""

    replay: AgemReplay = Field(AgemReplay(), description="which examples are kept")


class Agem(Method[AgemOptions]):
    """Projects gradients that would raise the loss of a memory."""

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss; nothing is learned from remembered rows."""
        return {} if batch.origin == "memory" else super().loss(params, state, batch, key)

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """The projection, and then the plain optimizer."""
        inner = parts.chain()

        def update(gradient: PyTree, state: PyTree, params: PyTree, *, reference: PyTree = None, **extra: Any) -> Any:
            if reference is not None:
                with jax.named_scope("project"):
                    gradient = without_conflict(gradient, reference)
            return inner.update(gradient, state, params, **extra)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """The gradient of the remembered rows, once there are any."""
        memory = batch.memory
        if memory is None:
            return {}

        def loss(part: Params) -> Array:
            term = Method.loss(self, overlay(params, part), state, memory, key)["loss"]
            return term.sum / jnp.maximum(term.count, 1.0)

        return {"reference": jax.grad(loss)(trained(params))}
