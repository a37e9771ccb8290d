"""Output distributions of a teacher: how they are stored with remembered rows, and compared with the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcl.functional.distillation import TopScores, full_divergence, top_divergence, top_scores
from jaxcl.functional.losses import over_positions, scored_states
from jaxcl.methods.base import Stored
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params


@dataclasses.dataclass(frozen=True)
class OutputStore:
    """Output distributions at scored positions, whole or by the likeliest tokens and some drawn ones.

    Attributes:
      tokens: stored tokens per position; 0: all.
      share: share of them that is drawn.
      chunk: see `over_positions`.
    """

    tokens: int
    share: float
    chunk: int

    def names(self, vocab_size: int) -> tuple[str, ...]:
        """Names of the stored arrays; compact ones in the order of `TopScores`.

        Args:
          vocab_size: number of token ids.
        """
        if not self.tokens:
            return ("scores",)
        return ("top_ids", "top_values") + (("drawn_ids", "drawn_values") if self._drawn(vocab_size) else ())

    def stored(self, vocab_size: int) -> dict[str, Stored]:
        """See `Method.stored`."""
        return {name: Stored(("predict",)) for name in self.names(vocab_size)}

    def write(
        self,
        network: Network,
        params: Params,
        states: Float[Array, "batch length embed"],
        batch: Batch,
        key: PRNGKeyArray,
    ) -> dict[str, Array]:
        """What is stored of a batch's rows; pure.

        Args:
          network: the network.
          params: the teacher's.
          states: its final states.
          batch: the rows.
          key: to draw tokens from, per example (`Batch.keys`).
        """
        states = scored_states(states, batch.predict)
        offsets = jax.vmap(lambda key: jax.random.uniform(key, states.shape[1:2]))(batch.keys(key))

        def part(inputs: tuple[Array, Array]) -> dict[str, Array]:
            return self._outputs(network.logits(params, inputs[0]), inputs[1])

        return over_positions(part, (states, offsets), self.chunk)

    def divergence(self, stored: Mapping[str, Array], logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
        """KL of stored distributions and the model's own, nats.

        Args:
          stored: the arrays of `names`, at the same positions.
          logits: the model's.
        """
        if not self.tokens:
            return full_divergence(stored["scores"], logits)
        return top_divergence(TopScores(*(stored[name] for name in self.names(logits.shape[-1]))), logits)

    def _drawn(self, vocab_size: int) -> int:
        """How many of the stored tokens of a position are drawn; none where all are stored."""
        return 0 if self.tokens >= vocab_size else int(self.share * self.tokens)

    def _outputs(self, logits: Array, offsets: Array) -> dict[str, Array]:
        if not self.tokens:
            return {"scores": jax.nn.log_softmax(logits, axis=-1)}
        vocab = logits.shape[-1]
        drawn = self._drawn(vocab)
        found = top_scores(logits, min(self.tokens, vocab) - drawn, drawn, offsets)
        return {name: value for name, value in zip(self.names(vocab), found, strict=False) if value is not None}


__all__ = ["OutputStore"]
