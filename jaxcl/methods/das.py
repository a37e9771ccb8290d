r"""DAS, second version: params that matter to what is known are held, one domain after another, with no data kept.

After *Continual Pre-training of Language Models* (Ke et al., ICLR 2023, arXiv 2302.03241), whose own version is
`das_paper`. As there, importance is measured for general knowledge before the first domain and for each domain after
it, and nothing else of a domain is kept. What differs:

- *What importance is.* The Fisher information of params, by the rows and columns of every matrix (`RowColumn`), and
  not a number per head or neuron. Embeddings, norms and output heads have it, too.
- *General knowledge* needs no dropout: the targets are drawn from the model itself. Its Fisher information is the
  second derivative of the divergence of the model's outputs from what they were, of which the paper's two dropout
  passes are an estimate.
- *Accumulation* has no ceiling: importance adds up, or its maximum is taken before any normalisation.
- *What it does.* A mask only slows params down. A pull brings them back to where they were before the domain
  (`elastic_optimizer`); `hold` chooses either, or both.
- There is no contrast.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from pydantic import Field

from jaxcl.functional.elastic_pull import elastic_optimizer
from jaxcl.functional.federated import Combine
from jaxcl.functional.row_column import Accumulation, RowColumn, Selection, Sides, importance_masks, select, unit_means
from jaxcl.functional.soft_masks import clip_by_what_moves
from jaxcl.methods.base import Method, OptimizerParts, Params, State, Task
from jaxcl.methods.options import MethodOptions
from jaxcl.methods.passes.squares import add_row_squares, drawn_squares
from jaxcl.models.batch import Batch
from jaxcl.models.trainable import trained


class DasOptions(MethodOptions):
    """Options of `das`."""

    hold: Literal["pull", "mask", "both"] = Field(
        "pull",
        description="what important params get; pull: they return to where they were before the domain; "
        "mask: smaller steps; both: both",
    )
    strength: float = Field(
        40.0,
        ge=0,
        description="lambda of the pull; the weight of what is known, compared with the domain at hand: under AdamW's "
        "usual moments, at about 4 an earlier token counts as much as a new one; 0: no pull",
    )
    mask_strength: float = Field(
        1.0, ge=0, description="c of the mask 1 / (1 + c F / mean F), with the importance F of a param; 0: no mask"
    )
    clip_masked: bool = Field(
        False,
        description="with hold mask or both: clip by the norm of what masks let through, not of the whole gradient",
    )
    keep_mean: bool = Field(
        False,
        description="divide masks by their mean in each layer's matrix (up to 4), so that the mean step is the "
        "optimizer's and importance only shifts it from some params to others",
    )
    general_knowledge: bool = Field(
        True,
        description="hold from the start what the model knows in general; false for a model from scratch, which knows "
        "nothing yet",
    )
    importance_examples: int = Field(
        2000, gt=0, description="examples of a domain that importance is measured on, for general knowledge as well"
    )
    targets: Literal["drawn", "true"] = Field(
        "drawn",
        description="targets of a domain's importance; drawn: from the model itself, one pass over batches; "
        "true: the domain's, one example at a time (general knowledge always has drawn ones)",
    )
    resolution: Literal["row_column", "full"] = Field(
        "row_column",
        description="row_column: a number per row and per column of a matrix; full: one per param, as much memory "
        "as the trained params",
    )
    evenness: float = Field(
        0.1,
        ge=0,
        le=1,
        description="e: importance is used as (1 - e) F + e mean F; 0: as measured, where a few "
        "params hold most of it; 1: all params alike",
    )
    accumulate: Accumulation = Field(
        "sum", description="importance for all domains so far: the sum over domains, or the maximum"
    )
    decay: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the earlier importance that is left after another domain; below 1, what no later domain "
        "needs is released",
    )
    anchor_dtype: Literal["params", "bfloat16"] = Field(
        "params", description="dtype of the copy that params are pulled to: that of the trained params, or bfloat16"
    )
    selection: Selection = Field(
        "measured",
        description="controls for experiments; measured: importance as it is; permuted: its rows and columns permuted "
        "within each layer's matrix; layer: the mean of each layer's matrix (evenness 1: the mean of all params)",
    )


class Sums(NamedTuple):
    """A measurement of importance.

    Attributes:
      total: sums of squared gradients of `-log p`.
      tokens: over how many scored tokens.
    """

    total: RowColumn
    tokens: Float[Array, ""]


class Das(Method[DasOptions]):
    """Importance by rows and columns, and an elastic pull.

    State: `importance`, a `RowColumn` over all trained params, 0 before anything is known; `anchor`, the trained
    params before the domain at hand; `history`, by kind of unit, how far general knowledge (place 0) and each domain
    need it, `[1 + tasks, layers, units]` in [0, 1).
    """

    offloaded = ("anchor",)

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        part = trained(params)
        history = {
            kind: jnp.zeros((self.num_tasks + 1, *gate.shape)) for kind, gate in vars(self.network.gates()).items()
        }
        return {"importance": RowColumn.zero(part, self.sides()), "anchor": self.anchor(params), "history": history}

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """Moves the anchor, and before the first domain measures what the model knows in general."""
        if self.pulls:
            state = {**state, "anchor": task.compile(self.anchor)(params)}
        if task.index > 0 or not self.options.general_knowledge:
            return state
        return self._measure(self.add_drawn, params, state, task, place=0)

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """After each domain: what it needs."""
        add = self.add_drawn if self.options.targets == "drawn" else self.add_true
        return self._measure(add, params, state, task, place=task.index + 1)

    def transform(self, parts: OptimizerParts) -> optax.GradientTransformationExtraArgs:
        """See `Method.transform`."""
        # The scale of the pull is taken by rows and columns, whatever the resolution of the importance is.
        sides = trained(self.network.sides())
        if self.masks and self.options.clip_masked:
            parts = parts._replace(clip=clip_by_what_moves(parts.clip))
        return elastic_optimizer(**parts._asdict(), sides=sides, mask=self.masks, pull=self.pulls)

    def update_args(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """Stiffness and anchor of the pull, and the masks."""
        found: dict[str, Any] = {}
        if self.pulls:
            full = self.importance_of(state["importance"])
            stiffness = jax.tree.map(lambda leaf: self.options.strength * leaf, full)
            found |= {"anchor": state["anchor"], "stiffness": stiffness}
        if self.masks:
            found["masks"] = self.masks_of(state["importance"])
        return found

    @property
    def shared_by(self) -> Combine:
        """As over domains: the mean over clients where importance adds up, else the maximum."""
        return "mean" if self.options.accumulate == "sum" else "maximum"

    def share(self, state: State) -> State:
        """The importance for all so far; `history` stays, and the anchor is the server's params, which all have."""
        return {"importance": state["importance"]}

    def tables(self, state: State) -> dict[str, Array]:
        """How far each unit is needed by all so far, and by each domain (place 0: general knowledge)."""
        tables = {f"importance_{kind}": value for kind, value in self.needs(state["importance"]).items()}
        return tables | {f"domains_{kind}": value for kind, value in state["history"].items()}

    def measurements(self, before: Params, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """See `Method.measurements`."""
        found = {}
        if self.options.targets == "true":
            found["importance"] = self.add_true(self.no_sums(), params, batch, key)
        if self.options.targets == "drawn" or self.options.general_knowledge:
            name = "importance" if self.options.targets == "drawn" else "general importance"
            found[name] = self.add_drawn(self.no_sums(), params, batch, key)
        return found

    @property
    def pulls(self) -> bool:
        """Whether there is a pull."""
        return self.options.hold != "mask" and self.options.strength > 0

    @property
    def masks(self) -> bool:
        """Whether there is a mask."""
        return self.options.hold != "pull" and self.options.mask_strength > 0

    def sides(self) -> Params:
        """The sides of the trained params, at the resolution of the importance."""

        def side(one: Sides) -> Sides:
            return one if self.options.resolution == "row_column" else Sides((*one.inputs, *one.outputs), ())

        return jax.tree.map(side, trained(self.network.sides()), is_leaf=lambda node: isinstance(node, Sides))

    def anchor(self, params: Params) -> Params:
        """The copy of the trained params that they are pulled to; without a pull, nothing. Pure."""
        if not self.pulls:
            return {}
        half = self.options.anchor_dtype == "bfloat16"
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if half else leaf, trained(params))

    def importance_of(self, importance: RowColumn) -> Params:
        """The importance of every trained param as it is used, see `evenness`; pure."""
        return importance.evened(self.options.evenness, trained(self.network.shapes()), self.sides())

    def masks_of(self, importance: RowColumn) -> Params:
        """The soft mask of every trained param; pure."""
        strength, keep = self.options.mask_strength, self.options.keep_mean
        return importance_masks(self.importance_of(importance), self.sides(), strength=strength, keep_mean=keep)

    def needs(self, importance: RowColumn) -> dict[str, Array]:
        """How far units are needed, `F / (F + mean F)` averaged over their params, `[layers, units]`; pure."""
        masks = importance_masks(importance.full(self.sides()), self.sides(), strength=1.0, keep_mean=False)
        needs = jax.tree.map(lambda mask: 1.0 - mask, masks)
        sizes = {kind: gate.shape for kind, gate in vars(self.network.gates()).items()}
        return unit_means(needs, trained(self.network.units()), sizes)

    def no_sums(self) -> Sums:
        """No example yet; pure."""
        return Sums(RowColumn.zero(trained(self.network.shapes()), self.sides()), jnp.float32(0))

    def add_drawn(self, sums: Sums, params: Params, batch: Batch, key: Array) -> Sums:
        """Adds a batch whose targets are drawn from the model; pure."""
        squares = drawn_squares(self.network, params, batch, key, self.options.loss_chunk)
        return Sums(sums.total.add(squares, self.sides()), sums.tokens + jnp.sum(batch.weights))

    def add_true(self, sums: Sums, params: Params, batch: Batch, key: Array) -> Sums:
        """Adds a batch with its own targets, one example at a time; pure."""
        sides = self.sides()
        total = add_row_squares(
            self.network,
            sums.total,
            params,
            batch,
            self.options.loss_chunk,
            lambda total, squares: total.add(squares, sides),
            whole_rows=True,
        )
        return Sums(total, sums.tokens + jnp.sum(batch.weights))

    def update_state(self, state: State, sums: Sums, place: Array) -> State:
        """Takes a finished measurement into the state; pure."""
        options = self.options
        new = sums.total.scaled(1.0 / jnp.maximum(sums.tokens, 1.0))
        # The same key for every domain, so that what was permuted alike adds up alike.
        new = select(new, self.sides(), options.selection, jax.random.key(0))
        history = {kind: state["history"][kind].at[place].set(one) for kind, one in self.needs(new).items()}
        importance = state["importance"].accumulated(new, options.accumulate, options.decay)
        return {**state, "importance": importance, "history": history}

    def _measure(self, add: Any, params: Params, state: State, task: Task, place: int) -> State:
        add, start = task.compile(add), task.compile(self.no_sums)()
        limit = self.options.importance_examples
        sums = task.fold(lambda sums, batch: add(sums, params, batch, task.key), start, limit=limit)
        return task.compile(self.update_state)(state, sums, jnp.int32(place))
