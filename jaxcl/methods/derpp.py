r"""Dark experience replay (DER++): remembered examples come back with the outputs the model had for them.

Buzzega et al., NeurIPS 2020 (arXiv 2004.07211). On remembered rows the loss is
$\alpha\, \overline{(h - h')^2} + \beta\, \text{cross-entropy}$, with the stored outputs $h'$ and the squared
difference averaged over its elements and over the scored positions.

The paper stores logits. Those of a language model are as wide as its vocabulary, so `match` names what is stored: the
`logits`, or the final `hidden` states they are computed from. Departures that follow from the frame: outputs are
stored when a task has been learned, not at a random moment while it is; both terms see the same remembered rows, not
two draws of them; and these are steps of their own between those of the task, as `replay` says, so that with alpha 0
and beta 1 this is the method `replay`. Remembered text is masked as it was when its outputs were stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.errors import UserError
from jaxcl.functional.losses import over_positions, scored_states, token_losses
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Stored
from jaxcl.methods.options import ReplayOptions
from jaxcl.methods.passes.losses import router_terms
from jaxcl.models.batch import Batch


class DerppOptions(ReplayOptions):
    """Options of `derpp`."""

    match: Literal["hidden", "logits"] = Field(
        "hidden",
        description="outputs that are stored and matched; hidden: final states, `hidden_size` numbers a scored "
        "position; logits: token scores, `vocab_size` numbers",
    )
    alpha: float = Field(0.5, ge=0, description="factor on the mean squared difference from the stored outputs")
    beta: float = Field(1.0, ge=0, description="factor on the cross-entropy of remembered rows")


class Derpp(Method[DerppOptions]):
    """Replays a memory and keeps its outputs near the stored ones."""

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss; on remembered rows both terms."""
        if batch.origin != "memory":
            return super().loss(params, state, batch, key)
        if batch.teacher is None:
            raise UserError("derpp: nothing is stored with the remembered rows; was the run's teacher store removed?")
        hidden = self.network.hidden(params, batch, dropout_key=key)
        states = scored_states(hidden.states, batch.predict)

        def compare(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            logits = self.network.logits(params, part[0])
            output = part[0] if self.options.match == "hidden" else logits
            return token_losses(logits, part[1]), _mean_square(output, part[2])

        inputs = (states, batch.targets, batch.teacher["outputs"])
        losses, differences = over_positions(compare, inputs, self.options.loss_chunk)
        count = jnp.sum(batch.weights)
        return {
            "loss": Term(jnp.sum(losses * batch.weights), count, self.options.beta),
            "match": Term(jnp.sum(differences * batch.weights), count, self.options.alpha),
            **router_terms(self.network, hidden, batch),
        }

    @property
    def stored(self) -> Mapping[str, Stored]:
        """See `Method.stored`."""
        return {"outputs": Stored(("predict",))}

    def signals(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Array]:
        """The outputs at the scored positions, without dropout.

        Returns:
          `outputs [batch, predict, embed or vocab]`: final states in the compute dtype, or float32 logits.
        """
        outputs = scored_states(self.network.hidden(params, batch).states, batch.predict)
        if self.options.match == "logits":
            outputs = self.network.logits(params, outputs)
        return {"outputs": outputs}


@jax.named_scope("distil")
def _mean_square(one: Float[Array, "... features"], other: Float[Array, "... features"]) -> Float[Array, "..."]:
    return jnp.mean(jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)), axis=-1)
