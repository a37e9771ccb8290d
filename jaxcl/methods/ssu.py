r"""Source-shielded updates: the columns of each matrix that matter most to what is known do not move.

Yamaguchi et al., 2025 (arXiv 2512.04844). A column $j$ of a matrix $W$ is what it does with its
input $j$. It is rated by

$$s_j = \sum_i |W_{ij}| \, \lVert X_j \rVert_2,$$

with the norm of that input over the tokens of known data; the best-rated share of each matrix's columns is frozen while
the next task is learned.

Departures: the paper rates once, on data of the language the model comes from. Here norms are measured after every
task on its own examples, and before the first task on that task's inputs, in place of data from before; the squares of
all measurements add up. Embeddings, norms, biases and output heads move freely.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from jaxcl.functional.largest_moments import largest_entries
from jaxcl.functional.row_column import Sides
from jaxcl.functional.soft_masks import masked_optimizer
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.inputs import matrix_sides, summed_input_squares
from jaxcl.models.batch import Batch
from jaxcl.models.network import ModelConfig
from jaxcl.models.trainable import trained


class SsuOptions(MethodOptions):
    """Options of `ssu`."""

    share: float = Field(
        0.5, gt=0, lt=1, description="share of each matrix's columns that do not move, one half in the paper"
    )
    importance_examples: int = Field(500, gt=0, description="examples of a task that columns are rated on")
    general_knowledge: bool = Field(
        True, description="freeze columns from the start; false for a model from scratch, which knows nothing yet"
    )


class Ssu(Method[SsuOptions]):
    """Freezes the columns that matter most.

    State: `squares`, mean squared inputs of each matrix of the layers, summed over measurements; `moves`, 1 for the
    columns that move during the task at hand, else 0. Both are vectors, a number per input.
    """

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        if model.lora is not None:
            raise ValueError("name: ssu freezes columns of the weights themselves; with model.lora, allowed: olora")
        if getattr(model, "num_experts", 0):
            raise ValueError("name: ssu cannot measure what experts read; allowed: models without experts")

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        squares = self.no_sums(params)[0]
        return {"squares": squares, "moves": jax.tree.map(jnp.ones_like, squares)}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Chooses the columns that stay, and before the first task measures what the model reads."""
        if task.index == 0:
            if not self.options.general_knowledge:
                return state
            state = self._measure(params, state, task)
        return task.compile(self.choose)(params, state)

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """Measures what the task made the matrices read."""
        return self._measure(params, state, task)

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`."""
        return masked_optimizer(**parts._asdict(), mask_on="update")

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """A mask of 0 for the columns that stay."""

        def mask(_: Any, moves: Any) -> Array:
            return jnp.float32(1) if moves is None else moves

        return {"masks": jax.tree.map(mask, trained(params), state["moves"])}

    def share(self, state: State) -> State:
        """What the matrices read."""
        return {"squares": state["squares"]}

    def measurements(self, before: Params, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """See `Method.measurements`."""
        return {"importance": self.add(self.no_sums(params), params, batch)}

    def choose(self, params: Params, state: State) -> State:
        """The state with the columns that move; pure."""

        def moves(kernel: Array, side: Sides | None, squares: Array | None) -> Array | None:
            if side is None or squares is None:
                return None
            size = jnp.sum(jnp.abs(kernel.astype(jnp.float32)), axis=side.outputs, keepdims=True)
            return 1.0 - largest_entries(size * jnp.sqrt(squares), side.inputs, self.options.share).astype(jnp.float32)

        return {**state, "moves": jax.tree.map(moves, params, matrix_sides(self.network), state["squares"])}

    def no_sums(self, params: Params) -> tuple[PyTree, Float[Array, ""]]:
        """Sums of squares, and of how many tokens; none yet. Pure."""

        def zeros(leaf: Array, side: Sides | None) -> Array | None:
            if side is None:
                return None
            return jnp.zeros([1 if axis in side.outputs else size for axis, size in enumerate(leaf.shape)])

        return jax.tree.map(zeros, params, matrix_sides(self.network)), jnp.float32(0)

    def add(
        self, sums: tuple[PyTree, Float[Array, ""]], params: Params, batch: Batch
    ) -> tuple[PyTree, Float[Array, ""]]:
        """Adds a batch; pure."""
        squares = summed_input_squares(self.network, params, batch, self.options.loss_chunk)
        return jax.tree.map(jnp.add, sums[0], squares), sums[1] + jnp.sum(batch.segments != 0)

    def update_state(self, state: State, sums: tuple[PyTree, Float[Array, ""]]) -> State:
        """Takes a finished measurement into the state; pure."""
        tokens = jnp.maximum(sums[1], 1.0)
        return {**state, "squares": jax.tree.map(lambda old, new: old + new / tokens, state["squares"], sums[0])}

    def _measure(self, params: Params, state: State, task: Task) -> State:
        add = task.compile(self.add)
        start = task.compile(self.no_sums)(params)
        sums = task.fold(lambda sums, batch: add(sums, params, batch), start, limit=self.options.importance_examples)
        return task.compile(self.update_state)(state, sums)
