"""MoFO: a step moves only the params with the largest momentum, so that the model stays near where it was.

Chen et al., 2024 (arXiv 2407.20999). Of every param of every layer, the share `share` of the entries with the largest
first moment gets the optimizer's step, and the others stay as they are; their moments go on. Nothing is kept of a task.
The paper's learning rates are those of plain fine-tuning.
"""

from __future__ import annotations

import jax
import optax
from pydantic import Field

from jaxcl.errors import UserError
from jaxcl.functional.largest_moments import largest_moments, moment_of
from jaxcl.methods.base import Method, OptimizerParts
from jaxcl.methods.options import MethodOptions
from jaxcl.models.trainable import trained


class MofoOptions(MethodOptions):
    """Options of `mofo`."""

    share: float = Field(
        0.15, gt=0, le=1, description="share of the entries of each layer's param that a step moves, 0.15 in the paper"
    )


class Mofo(Method[MofoOptions]):
    """Moves the entries with the largest first moment."""

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`.

        Raises:
          UserError: the optimizer has no first moment.
        """
        if moment_of(jax.eval_shape(parts.precondition.init, trained(self.network.shapes()))) is None:
            raise UserError(
                "method.name: mofo chooses by the optimizer's first moment; allowed: optimizer.name adamw or lion, or "
                "sgd with b1 above 0"
            )
        sides = trained(self.network.sides())
        return largest_moments(**parts._asdict(), sides=sides, share=self.options.share)
