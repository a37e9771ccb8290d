"""DAS: continual domain-adaptive pre-training with soft masks (Ke et al., ICLR 2023, arXiv 2302.03241).

Units of the network (attention heads, feed-forward intermediate units and outputs) get an importance: for general
knowledge once before the first domain, for each domain's knowledge after it; the maximum so far is kept. While a
domain is learned, params move by one minus the importance of their unit, and a contrastive loss pushes the model's
output away from what the important units alone would give. No domain id is needed afterwards.

Where the authors' code departs from the paper, the paper is followed: absolute values of gate gradients are taken per
example, not of their sum; the general proxy compares two real dropout passes by their output distributions; domain
importance sees the masked inputs the loss is defined on; masks lie on the heads' own axis and act once per step; a
contrast's positive is the same example; pooling leaves padding out. All passes see the same (masked) input.

Further departures from the authors' code, where the paper says nothing: the gate of an intermediate unit comes after
the activation, not before it; standardisation divides by the population deviation, not by that of a sample (n, not
n - 1), which matters for a handful of heads; the bias of the attention output is shared by all heads, not masked by
one.

The paper leaves decoders open: here they work alike. Where the model has no dropout of its own, the passes that need
noise drop hidden states (`proxy_dropout`) and leave attention probabilities alone: dropping those too would take
attention off its fast kernel and hold an array `[batch, heads, length, length]` per layer.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from pydantic import Field

from jaxcl.functional.contrastive import contrast, pool
from jaxcl.functional.federated import Combine
from jaxcl.functional.importance import ImportanceSums, Normalisation, accumulate, normalise
from jaxcl.functional.soft_masks import MaskOn, Shared, clip_by_what_moves, masked_optimizer, soft_masks
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.importance import Proxy, add_domain_importance, add_general_importance
from jaxcl.methods.passes.losses import language_model_loss, router_terms
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import ModelConfig
from jaxcl.models.trainable import trained


class DasPaperOptions(MethodOptions):
    """Options of `das_paper`; the defaults are the paper's, but for `mask_on` and `anchor`.

    The paper's optimizer undoes masks on the gradient; the anchor's own pass changes no expected gradient.
    """

    importance_examples: int = Field(
        10_000, gt=0, description="examples of a domain that importance is measured on, for general knowledge as well"
    )
    general_knowledge: bool = Field(
        True,
        description="protect from the start what the model knows in general; false for a model from scratch, which "
        "knows nothing yet: masks would only slow down its first domain",
    )
    normalisation: Normalisation = Field(
        "tanh",
        description="how importance is scaled to [0, 1] per layer; tanh: standardise, tanh, absolute value; "
        "quantile: by rank, so that the share of protected units is fixed",
    )
    protected_share: float = Field(
        0.5, gt=0, le=1, description="share of a layer's units that normalisation `quantile` protects, by domain"
    )
    mask_on: MaskOn = Field(
        "update",
        description="update: masks what the optimizer makes of the gradient; gradient: masks the gradient before it, "
        "the paper's text, which Adam divides out again",
    )
    shared: Shared = Field(
        "free",
        description="params that belong to no unit (embeddings, norms, output heads); free: not masked; "
        "mean: masked by their layer's mean importance; frozen: not trained",
    )
    clip_masked: bool = Field(
        False,
        description="clip by the norm of what masks let through; false: by that of the whole gradient, to which params "
        "that masks hold add for good",
    )
    contrast_weight: float = Field(
        1.0, ge=0, description="factor on the contrastive loss; 0: none, without its forward passes"
    )
    temperature: float = Field(0.05, gt=0, description="temperature of the contrastive loss")
    anchor: Literal["own", "language_model"] = Field(
        "language_model",
        description="pass the contrast's anchor comes from; language_model: that of the language-model loss, which "
        "saves a pass and, where the model has dropout, changes no expected gradient; own: one of its own",
    )
    negatives: Literal["trained", "fixed"] = Field(
        "trained",
        description="gated pass that gives the contrast its knowledge of the past; trained: differentiated like the "
        "others; fixed: a constant, which costs a forward pass and keeps nothing for a backward pass",
    )
    proxy: Proxy = Field(
        "outputs",
        description="what the two passes of the general-knowledge proxy are compared by; outputs: the distributions "
        "over tokens; pooled: the softmax of the mean state, which needs no token scores",
    )
    proxy_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout of hidden states in the passes of the general-knowledge proxy and of the contrast, "
        "for models that have none of their own",
    )


class DasPaper(Method[DasPaperOptions]):
    """Soft masks and contrast.

    State: `importance`, the accumulated `Gates` in [0, 1], zero before the first domain; `history`, the normalised
    importance of general knowledge (place 0) and of each domain.
    """

    @property
    def couples_examples(self) -> bool:
        """The contrast does."""
        return self.options.contrast_weight > 0 or super().couples_examples

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        noisy = options.general_knowledge or options.contrast_weight > 0
        if noisy and _own_dropout(model) == 0 and options.proxy_dropout == 0:
            raise ValueError("proxy_dropout: 0 leaves the general-knowledge proxy without noise; allowed: above 0")

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        zero = jax.tree.map(jnp.zeros_like, self.network.gates())
        history = jax.tree.map(lambda gate: jnp.zeros((self.num_tasks + 1, *gate.shape)), zero)
        return {"importance": zero, "history": history}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Before the first domain: what the model knows in general."""
        if task.index > 0 or not self.options.general_knowledge:
            return state
        return self._learn_importance(self.add_general, params, state, task, place=0)

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """After each domain: what it needs."""
        return self._learn_importance(self.add_domain, params, state, task, place=task.index + 1)

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss and contrast."""
        model_key, contrast_key = jax.random.split(key)
        hidden = self.network.hidden(params, batch, dropout_key=model_key)
        chunk, gate = self.options.loss_chunk, self.options.loss_gate
        terms = {"loss": language_model_loss(self.network, params, hidden.states, batch, chunk, gate)}
        terms |= router_terms(self.network, hidden, batch)
        if self.options.contrast_weight > 0:
            anchor = pool(hidden.states, batch.segments) if self.options.anchor == "language_model" else None
            terms["contrast"] = self._contrast(params, state["importance"], batch, anchor, contrast_key)
        return terms

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`."""
        if self.options.clip_masked:
            parts = parts._replace(clip=clip_by_what_moves(parts.clip))
        return masked_optimizer(**parts._asdict(), mask_on=self.options.mask_on)

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """The soft masks."""
        network = self.network
        masks = soft_masks(network.units(), network.shapes(), vars(state["importance"]), self.options.shared)
        return {"masks": trained(masks)}

    @property
    def shared_by(self) -> Combine:
        """The maximum, as over domains."""
        return "maximum"

    def share(self, state: State) -> State:
        """The accumulated importance: a number per unit; `history` stays."""
        return {"importance": state["importance"]}

    def tables(self, state: State) -> dict[str, Array]:
        """Accumulated importance, and that of each domain (place 0: general knowledge)."""
        tables = {f"importance_{name}": value for name, value in vars(state["importance"]).items()}
        return tables | {f"domains_{name}": value for name, value in vars(state["history"]).items()}

    def measurements(self, before: Params, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """See `Method.measurements`."""
        zero = ImportanceSums.zero(self.network.gates())
        found = {"importance": self.add_domain(zero, params, batch, key)}
        if self.options.general_knowledge:
            found["general importance"] = self.add_general(zero, params, batch, key)
        return found

    def add_general(self, sums: ImportanceSums, params: Params, batch: Batch, key: Array) -> ImportanceSums:
        """Adds a batch to the importance for general knowledge; pure."""
        rate = self._noise_rate()
        options = self.options
        return add_general_importance(self.network, sums, params, batch, key, rate, options.loss_chunk, options.proxy)

    def add_domain(self, sums: ImportanceSums, params: Params, batch: Batch, key: Array) -> ImportanceSums:
        """Adds a batch to the importance for the domain at hand; pure."""
        return add_domain_importance(self.network, sums, params, batch, self.options.loss_chunk)

    def update_state(self, state: State, sums: ImportanceSums, place: Array) -> State:
        """Takes a finished measurement into the state; pure."""
        new = normalise(sums.mean(), self.options.normalisation, self.options.protected_share)
        history = jax.tree.map(lambda before, one: before.at[place].set(one), state["history"], new)
        return {"importance": accumulate(state["importance"], new), "history": history}

    def _learn_importance(self, add: Any, params: Params, state: State, task: Task, place: int) -> State:
        add, start = task.compile(add), ImportanceSums.zero(self.network.gates())
        limit = self.options.importance_examples
        sums = task.fold(lambda sums, batch: add(sums, params, batch, task.key), start, limit=limit)
        return task.compile(self.update_state)(state, sums, jnp.int32(place))

    @jax.named_scope("contrast")
    def _contrast(self, params: Params, importance: Gates, batch: Batch, anchor: Array | None, key: Array) -> Term:
        """One pass each for the positives, the past and, if there is none yet, the anchors.

        Before anything is known (all importance is 0, as in the first domain with `general_knowledge: false`), the
        gates of the past would all be closed: there is nothing to contrast with, and no pass.

        One batch of all their rows, with gates of 1 where none are needed, is no faster (`benchmarks/das_cost.py`).
        """
        anchor_key, positive_key, past_key = jax.random.split(key, 3)
        known = jnp.any(jnp.stack([jnp.any(leaf > 0) for leaf in jax.tree.leaves(importance)]))
        real = jnp.any(batch.segments != 0, axis=1)

        def total() -> Array:
            own = self._pooled(params, batch, None, anchor_key) if anchor is None else anchor
            positive = self._pooled(params, batch, None, positive_key)
            fixed = self.options.negatives == "fixed"
            past = self._pooled(jax.lax.stop_gradient(params) if fixed else params, batch, importance, past_key)
            return contrast(own, positive, past, real, self.options.temperature)[0]

        # The count is taken outside: where it alone is asked for, the compiler drops the passes.
        count = jnp.sum(real.astype(jnp.float32)) * known
        return Term(jax.lax.cond(known, total, lambda: jnp.float32(0)), count, self.options.contrast_weight)

    def _pooled(self, params: Params, batch: Batch, gates: Gates | None, key: Array) -> Array:
        rate = self._noise_rate()
        states = self.network.hidden(params, batch, gates=gates, dropout_key=key, dropout_rate=rate).states
        return pool(states, batch.segments)

    def _noise_rate(self) -> float | None:
        return None if _own_dropout(self.network.config) > 0 else self.options.proxy_dropout


def _own_dropout(model: ModelConfig) -> float:
    return max(model.dropout_rates)
