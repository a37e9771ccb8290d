r"""Orthogonal subspace fine-tuning: a task learns in directions that the weights hardly use yet.

Nayak et al., 2025 (arXiv 2504.07097). Before a task, each matrix $W$ of each layer is taken apart into singular
directions, $W = U \Sigma V^\top$. Those with the largest singular values hold what is known and stay; the step is
projected onto the rest, $\Delta W \leftarrow (I - U_k U_k^\top)\, \Delta W\, (I - V_k V_k^\top)$. Nothing is kept of a
task.

Departures: the paper chooses the number of directions per layer, by how alike the layer's inputs and outputs are; here
`share` is the same for all layers. It trains the remaining singular vectors and values, with projected gradients; here
the optimizer's step of the whole matrix is projected, since Adam's step along a projected gradient leaves the subspace
again. Embeddings, norms and biases move freely.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from pydantic import Field

from jaxcl.functional.projection import leading_directions, orthogonal_optimizer, smaller_side
from jaxcl.functional.row_column import Sides
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.inputs import matrix_sides
from jaxcl.models.batch import Batch
from jaxcl.models.network import ModelConfig


class OsftOptions(MethodOptions):
    """Options of `osft`."""

    share: float = Field(
        0.5, gt=0, lt=1, description="share of the singular directions of each matrix that stay as they are"
    )
    general_knowledge: bool = Field(
        True,
        description="keep directions from the start; false for a model from scratch, which knows nothing yet",
    )


class Osft(Method[OsftOptions]):
    """Projects steps away from the leading singular directions of the weights.

    State: `directions`, those of both sides of each matrix: twice `share` of the memory of a square matrix.
    """

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        if model.lora is not None:
            raise ValueError("name: osft holds directions of the weights themselves; with model.lora, allowed: olora")

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        shapes = jax.eval_shape(self.directions, params)
        return {"directions": jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Takes the weights apart."""
        if task.index == 0 and not self.options.general_knowledge:
            return state
        return {"directions": task.compile(self.directions)(params)}

    def directions(self, params: Params) -> PyTree:
        """The leading directions of every matrix of a layer, `None` for other params; pure."""

        def leading(leaf: Any, side: Sides | None) -> Any:
            if side is None:
                return None
            return leading_directions(leaf, side, max(1, round(self.options.share * smaller_side(leaf, side))))

        return jax.tree.map(leading, params, matrix_sides(self.network))

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`."""
        return orthogonal_optimizer(parts.chain(), self.network.sides())

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """The directions that stay."""
        return {"directions": state["directions"]}
