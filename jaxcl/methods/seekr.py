"""SEEKR: replay that distils the attention heads that matter (He et al., EMNLP 2024, arXiv 2411.06171).

After a task, heads are rated by how sensitive the task's loss is to their attention weights and by how far the weights
moved while the task was learned; the best heads of the best layers are kept for the task's memory. Their attention
rows at some query positions and the output distributions at the answer's positions are stored with each remembered
example, and later replay steps minimise (1 - a) cross-entropy + a output divergence + b attention divergence. By
default what the heads give at these positions is stored and compared in place of their rows (`distil_heads`).

Where the authors' code departs from the paper, the paper is followed: outputs are distilled at the positions that
predict the answer; memory is drawn at random; padding and future keys count nowhere; importance over tasks is the
product of sums (their sum of products is the option `importance`). Short examples have fewer sampled queries instead
of some drawn twice. Attention maps are never stored or gathered whole.

Further departures from the authors' code, where the paper says nothing: the attention term is a mean over examples,
each over its own layers (`example_divergence`); forgettability counts all queries, not the sampled ones; outputs are
compared by KL divergence instead of cross-entropy, which differs by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxcl.errors import UserError
from jaxcl.functional.attention_distillation import example_divergence, heads_of_layers
from jaxcl.functional.attention_rows import sample_queries
from jaxcl.functional.balance import Balance
from jaxcl.functional.heads import (
    HeadImportance,
    HeadSums,
    combine,
    normalise_sensitivity,
    resolve_budget,
    select_heads,
)
from jaxcl.functional.losses import gated_losses, over_positions, scored_states
from jaxcl.functional.modalities import BLOCKS, PartWeights, select_by_block
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method, Params, State, Stored, Task
from jaxcl.methods.options import ReplayConfig
from jaxcl.methods.passes.blocks import add_block_forgettability, add_block_sensitivity, no_block_sums, whole
from jaxcl.methods.passes.heads import add_forgettability, add_sensitivity
from jaxcl.methods.passes.losses import router_terms
from jaxcl.methods.passes.stored_attention import AttentionStore, RowStore, ValueStore
from jaxcl.methods.passes.stored_outputs import OutputStore
from jaxcl.methods.seekr_options import SeekrOptions, check_options
from jaxcl.methods.tool_hooks import Exact
from jaxcl.models.batch import Batch
from jaxcl.models.network import ModelConfig, Network
from jaxcl.models.probe import Probe
from jaxcl.models.trainable import overlay, trained


class Seekr(Method[SeekrOptions]):
    """Replay with selective attention distillation.

    State: `sensitivity` (normalised) and `forgettability` `[tasks, layers, heads]`, zeros for tasks to come; `heads`
    `[tasks, selected, 2]`, the (layer, head) pairs selected when each task was learned, -1 for tasks to come. With
    `distil_on: task` also `teacher`, the trained params before the task at hand, and `learned`, the tasks before it;
    with `attention_weight: auto` also `balance`, the running means of the terms (`jaxcl.functional.Balance`), and with
    `logit_weight: auto` `output_balance`; with `modality_budgets` also `block_sensitivity` and `block_forgettability`
    `[tasks, blocks, layers, heads]`.

    What is stored with remembered rows and comes back as `batch.teacher` (a teacher made by hand must hold the same):

    - `heads [batch, selected, 2]`, integers: the (layer, head) pairs whose rows are stored; -1 for none;
    - `queries [batch, queries]`, int32: the positions of the stored rows, strictly rising, -1 behind the last;
    - `rows [batch, selected, queries, length]`: attention weights of these heads at these positions, float32; with
      `store_attention: uint8` their codes, and `largest [batch, selected, queries]`, float32: the arrays of
      `jaxcl.functional.CodedRows`. With `distil_heads: values` instead `values [batch, selected, queries, head_dim]`,
      what these heads give there (`jaxcl.functional.head_values`);
    - outputs at the scored positions (`predict`; all of them where `batch.predict` is None): `top_ids` (int32) and
      `top_values` (log probabilities, float32) `[batch, predict, top]`, the likeliest tokens; with `store_drawn` also
      `drawn_ids` and `drawn_values` `[batch, predict, drawn]` (`jaxcl.functional.TopScores`). With `store_logits: 0`
      instead `scores [batch, predict, vocab]`, all log probabilities, float32.
    """

    asks_for_before = True

    def __init__(self, options: SeekrOptions, network: Network, num_tasks: int) -> None:
        super().__init__(options, network, num_tasks)
        self.check(options, network.config)
        self.layers = resolve_budget(options.layer_budget, network.num_layers)
        if options.modality_budgets is None:
            self.heads = resolve_budget(options.head_budget, network.num_layers * network.num_heads)
        else:
            self.heads = sum(options.modality_budgets)
        self.per_layer = min(options.heads_per_layer or network.num_heads, self.heads)
        exact = options.store_attention == "float32"
        weights = PartWeights(*options.modality_weights)
        rows = RowStore(not exact, None if weights == PartWeights() else weights)
        self.attention: AttentionStore = rows if options.distil_heads == "rows" else ValueStore(exact)
        self.outputs = OutputStore(options.store_logits, options.store_drawn, options.loss_chunk)
        # If all rows select the same heads, the loop runs heads / num_layers times per layer on average.
        self.loop_trips = max(1, round(self.heads / network.num_layers))

    @property
    def replay(self) -> ReplayConfig | None:
        """None with `distil_on: task`."""
        return self.options.replay if self.options.distil_on == "memory" else None

    @classmethod
    def check(cls, options: Any, model: ModelConfig) -> None:
        """See `Method.check`."""
        check_options(options, model)

    @classmethod
    def without_training(cls, options: Any) -> tuple[Any, str]:
        """Sensitivity alone: without training, no attention weight moves."""
        missing = (
            "Forgettability compares attention before and after training, so it cannot be measured on a model that was "
            "not trained: heads are rated by sensitivity alone. A run folder shows both."
        )
        return options.model_copy(update={"importance": "sensitivity"}), missing

    def exact(self) -> Exact:
        """See `ToolHooks.exact`."""
        changes = {"store_logits": 0, "store_attention": "float32"}
        method = type(self)(self.options.model_copy(update=changes), self.network, self.num_tasks)

        def read(params: Params, batch: Batch, key: Array) -> dict[str, Array]:
            assert batch.teacher is not None
            return method.read(params, batch, batch.teacher["heads"], batch.teacher["queries"], key)

        return Exact(method, read)

    def init(self, params: Params) -> State:
        """See `Method.init`."""
        scores = jnp.zeros((self.num_tasks, self.network.num_layers, self.network.num_heads))
        heads = jnp.full((self.num_tasks, self.heads, 2), -1, jnp.int32)
        state: dict[str, Any] = {"sensitivity": scores, "forgettability": scores, "heads": heads}
        if self.options.modality_budgets is not None:
            blocks = jnp.zeros((self.num_tasks, len(BLOCKS), *scores.shape[1:]))
            state |= {"block_sensitivity": blocks, "block_forgettability": blocks}
        if self.options.distil_on == "task":
            state |= {"teacher": trained(params), "learned": jnp.int32(0)}
        if self.options.attention_weight == "auto":
            state["balance"] = Balance.zero()
        if self.options.logit_weight == "auto":
            state["output_balance"] = Balance.zero()
        return state

    def track(
        self, params: Params, state: State, before: Params, gradient: Params, means: Mapping[str, Array]
    ) -> State:
        """The running means of the terms of remembered rows whose weights are `auto`."""
        prefix = next((prefix for prefix in ("", "memory_") if f"{prefix}logits" in means), None)
        if prefix is None:
            return state
        loss, outputs, attention = (means.get(f"{prefix}{name}") for name in ("loss", "logits", "attention"))
        assert loss is not None
        assert outputs is not None
        if self.options.logit_weight == "auto":
            state = state | {"output_balance": state["output_balance"].add(outputs, loss)}
        if self.options.attention_weight == "auto" and attention is not None:
            own = 1.0 if self.options.distil_on == "task" else self._loss_weight
            rest = own * loss + self._output_weight(state) * outputs
            state = state | {"balance": state["balance"].add(attention, rest)}
        return state

    def prepare(self, params: Params, state: State, task: Task) -> State:
        """With `distil_on: task`, the model as it is becomes the teacher."""
        if self.options.distil_on == "memory":
            return state
        return state | {"teacher": trained(params), "learned": jnp.int32(task.index)}

    def consolidate(self, params: Params, state: State, task: Task) -> State:
        """Rates the heads on the task's memory (or examples, where none is kept), and selects some for the task."""
        add_sensitivity, add_forgettability = task.compile(self.add_sensitivity), task.compile(self.add_forgettability)
        before = task.params_before()

        def add(sums: tuple[HeadSums, HeadSums], batch: Batch) -> tuple[HeadSums, HeadSums]:
            return add_sensitivity(sums[0], params, batch), add_forgettability(sums[1], before, params, batch)

        start, kept = (self.no_sums(), self.no_sums()), self.options.distil_on == "memory"
        sums = task.fold(add, start, limit=self.options.importance_examples, memory=kept)
        return task.compile(self.select)(state, *sums, jnp.int32(task.index), task.key)

    def loss(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Language-model loss; on remembered rows with both divergences (SEEKR, equation 9)."""
        if batch.origin != "memory":
            if self.options.distil_on == "task":
                return self._taught(params, state, batch, key)
            return super().loss(params, state, batch, key)
        if batch.teacher is None:
            raise UserError(
                "seekr: nothing is stored with the remembered rows; it needs rows of one example each: for text, "
                "set data.packing to false"
            )
        if missing := sorted(self.stored.keys() - batch.teacher.keys()):
            raise ValueError(f"batch.teacher: {', '.join(missing)} missing; see the class Seekr")
        return self._distilled(params, state, batch, batch.teacher, key)

    def attention_by_layer(
        self, params: Params, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, "layers batch"], Bool[Array, "layers batch"]]:
        """The attention term before it is averaged: divergences by layer and remembered row; pure.

        `loss` averages them by `jaxcl.functional.example_divergence`: over a row's own layers, then over rows.

        Args:
          params: the student's params.
          batch: remembered rows with `teacher`.
          key: for dropout; `None`: nothing is dropped.

        Returns:
          Mean KL (nats) of each row's stored attention rows in a layer, 0 where it has none there; whether it has any.
          With `distil_heads: values` the mean of what `jaxcl.functional.value_divergence` gives.
        """
        if batch.teacher is None:
            raise ValueError("batch.teacher: expected what `signals` gives, got None")
        return self.network.hidden(params, batch, probe=self._probe(batch.teacher, batch), dropout_key=key).probed

    def _taught(self, params: Params, state: State, batch: Batch, key: Array) -> Terms:
        """Rows of the task at hand, taught by the model before it; during the first task, divergences count nothing.

        These rows are there to be learned, so their cross-entropy weighs 1; a and b are those of equation 9.
        """
        model_key, query_key, offset_key = jax.random.split(key, 3)
        known = state["learned"] > 0
        heads = state["heads"][jnp.maximum(state["learned"] - 1, 0)]
        heads = jnp.broadcast_to(heads, (batch.size, *heads.shape))
        queries = sample_queries(batch.keys(query_key), batch.segments, self.options.query_budget)

        def read() -> dict[str, Array]:
            return self.read(overlay(params, state["teacher"]), batch, heads, queries, offset_key)

        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(read))
        teacher = jax.lax.stop_gradient(jax.lax.cond(known, read, lambda: nothing))
        terms = self._distilled(params, state, batch, teacher | {"heads": heads, "queries": queries}, model_key)
        terms["loss"] = terms["loss"]._replace(weight=1.0)
        for name in terms.keys() - {"loss", "router"}:
            terms[name] = Term(terms[name].sum * known, terms[name].count * known, terms[name].weight)
        return terms

    def _distilled(
        self, params: Params, state: State, batch: Batch, teacher: Mapping[str, Array], key: Array
    ) -> dict[str, Term]:
        """Cross-entropy and both divergences from a teacher (SEEKR, equation 9)."""
        terms = {}
        probe = self._probe(teacher, batch) if self.options.attention_weight != 0 else None
        hidden = self.network.hidden(params, batch, probe=probe, dropout_key=key)
        if probe is not None:
            divergence, present = example_divergence(*hidden.probed)
            count = jnp.sum(present.astype(jnp.float32))
            terms["attention"] = Term(jnp.sum(divergence), count, self._attention_weight(state))

        gate = "none" if batch.origin == "memory" else self.options.loss_gate

        def scores(part: tuple[Array, Array, dict[str, Array]]) -> tuple[Array, Array]:
            logits = self.network.logits(params, part[0])
            return gated_losses(logits, part[1], gate), self.outputs.divergence(part[2], logits)

        outputs = {name: teacher[name] for name in self.outputs.names(self.network.vocab_size)}
        inputs = (scored_states(hidden.states, batch.predict), batch.targets, outputs)
        sums = [jnp.sum(one * batch.weights) for one in over_positions(scores, inputs, self.options.loss_chunk)]
        count = jnp.sum(batch.weights)
        terms["loss"] = Term(sums[0], count, self._loss_weight)
        terms["logits"] = Term(sums[1], count, self._output_weight(state))
        return terms | router_terms(self.network, hidden, batch)

    @property
    def _loss_weight(self) -> float:
        a = self.options.logit_weight
        return 1.0 if a == "auto" else 1.0 - a

    def _output_weight(self, state: State) -> float | Array:
        if self.options.logit_weight != "auto":
            return self.options.logit_weight
        weight: Array = state["output_balance"].weight(self.options.logit_share, self.options.logit_limit)
        return weight

    def _attention_weight(self, state: State) -> float | Array:
        options = self.options
        if options.attention_weight != "auto":
            return options.attention_weight
        weight: Array = state["balance"].weight(options.attention_share, options.attention_limit)
        return weight

    def _probe(self, teacher: Mapping[str, Array], batch: Batch) -> Probe:
        """Compares what is stored of heads with each layer's own."""
        return Probe(
            lambda view, heads: self.attention.divergence(view, teacher, heads, batch.modality),
            heads_of_layers(teacher["heads"], self.network.num_layers),
        )

    @property
    def stored(self) -> Mapping[str, Stored]:
        """See `Method.stored`."""
        places = {"heads": Stored(fill=-1), "queries": Stored(("queries",), fill=-1)}
        return {**places, **self.attention.stored, **self.outputs.stored(self.network.vocab_size)}

    @jax.named_scope("teacher")
    def signals(self, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Array]:
        """Attention rows of the selected heads at sampled queries, and output distributions.

        Returns:
          What `batch.teacher` holds, see the class.
        """
        query_key, offset_key = jax.random.split(key)
        heads = state["heads"][batch.task]
        queries = sample_queries(batch.keys(query_key), batch.segments, self.options.query_budget)
        if self.options.attention_weight == 0:  # nothing would read it: room for one head and query, and none there
            heads, queries = (jnp.full_like(places[:, :1], -1) for places in (heads, queries))
        return self.read(params, batch, heads, queries, offset_key)

    def read(self, params: Params, batch: Batch, heads: Array, queries: Array, key: Array) -> dict[str, Array]:
        """What the store holds of attention at given heads and queries, and of the outputs; pure.

        Args:
          params: the teacher's params.
          batch: token rows.
          heads: (layer, head) pairs `[batch, selected, 2]`, -1 for none.
          queries: query positions `[batch, queries]`, -1 for none.
          key: for drawing tokens besides the likeliest, per example (`Batch.keys`).

        Returns:
          See `signals`.
        """
        network, context = self.network, self.network.context(batch)
        (rows, selected), (_, length) = heads.shape[:2], batch.tokens.shape
        arrays = self.attention.empty(network, rows, selected, queries.shape[1], length)

        def body(carry: tuple[Array, PyTree], layer: tuple[Params, Array]) -> tuple[tuple[Array, PyTree], None]:
            x, arrays = carry
            probe = Probe(lambda view, heads: self.attention.write(view, arrays, heads, queries), layer[1])
            return network.block(layer[0], x, batch, context=context, probe=probe), None

        layers = network.blocks(params), heads_of_layers(heads, network.num_layers)
        (x, arrays), _ = jax.lax.scan(body, (network.embed(params, batch), arrays), layers)
        outputs = self.outputs.write(network, params, network.finish(params, x), batch, key)
        return {"heads": heads.astype(jnp.int16), "queries": queries, **self.attention.named(arrays), **outputs}

    def tables(self, state: State) -> dict[str, Array]:
        """Both measures by task, importance over the tasks so far, and the heads selected by task.

        With `modality_budgets` also both measures by block, and `importance_blocks` `[blocks, layers, heads]`.
        """
        selected = jnp.zeros(state["sensitivity"].shape, bool)
        task = jnp.arange(self.num_tasks)[:, None]
        layer, head = state["heads"][..., 0], state["heads"][..., 1]
        layer = jnp.where(layer < 0, self.network.num_layers, layer)
        # Where heads are drawn, what would have been chosen otherwise is worth a picture.
        how: HeadImportance = "product_of_sums" if self.options.importance == "random" else self.options.importance
        blocks = {name: state[name] for name in ("block_sensitivity", "block_forgettability") if name in state}
        if blocks:
            blocks["importance_blocks"] = combine(state["block_sensitivity"], state["block_forgettability"], how)
        return blocks | {
            "sensitivity": state["sensitivity"],
            "forgettability": state["forgettability"],
            "importance_heads": combine(state["sensitivity"], state["forgettability"], how),
            "selected_heads": selected.at[task, layer, head].set(True, mode="drop"),
        }

    def measurements(self, before: Params, params: Params, state: State, batch: Batch, key: Array) -> dict[str, Any]:
        """See `Method.measurements`."""
        zero = self.no_sums()
        return {
            "sensitivity": self.add_sensitivity(zero, params, batch),
            "forgettability": self.add_forgettability(zero, before, params, batch),
        }

    def no_sums(self) -> HeadSums:
        """What is measured of a task before its first batch; with `modality_budgets` by block."""
        if self.options.modality_budgets is not None:
            return no_block_sums(self.network)
        return HeadSums.zero(self.network.num_layers, self.network.num_heads)

    def add_sensitivity(self, sums: HeadSums, params: Params, batch: Batch) -> HeadSums:
        """Adds a batch to the sensitivity of the task at hand; pure."""
        if self.options.modality_budgets is not None:
            return add_block_sensitivity(self.network, sums, params, batch, self.options.loss_chunk)
        return add_sensitivity(self.network, sums, params, batch, self.options.loss_chunk)

    def add_forgettability(self, sums: HeadSums, before: Params, params: Params, batch: Batch) -> HeadSums:
        """Adds a batch to the forgettability of the task at hand; pure."""
        if self.options.modality_budgets is not None:
            return add_block_forgettability(self.network, sums, before, params, batch)
        return add_forgettability(self.network, sums, before, params, batch)

    def select(
        self, state: State, sensitivity: HeadSums, forgettability: HeadSums, index: Array, key: Array | None = None
    ) -> State:
        """Takes finished measurements into the state and selects the heads of task `index`; pure.

        `key` is what importance `random` draws from.
        """
        measured = {"sensitivity": sensitivity, "forgettability": forgettability}
        if self.options.modality_budgets is not None:
            measured = {f"block_{name}": sums for name, sums in measured.items()} | {
                name: whole(sums) for name, sums in measured.items()
            }
        means = {name: sums.mean() for name, sums in measured.items()}
        means |= {name: normalise_sensitivity(mean) for name, mean in means.items() if "sensitivity" in name}
        state = state | {name: state[name].at[index].set(mean) for name, mean in means.items()}
        return state | {"heads": state["heads"].at[index].set(self._choose(state, key))}

    def _choose(self, state: State, key: Array | None = None) -> Array:
        """The heads that matter most by all that was measured so far."""
        how, budgets = self.options.importance, self.options.modality_budgets
        importance = combine(state["sensitivity"], state["forgettability"], how, key)
        if budgets is None:
            return select_heads(importance, self.layers, self.heads, self.per_layer)
        by_block = combine(state["block_sensitivity"], state["block_forgettability"], how, key)
        # A block that no example has so far gets what matters in all blocks together.
        known = jnp.any(by_block > 0, axis=(1, 2), keepdims=True)
        return select_by_block(jnp.where(known, by_block, importance), self.layers, budgets, self.per_layer)

    def share(self, state: State) -> State:
        """Sensitivity and forgettability of heads by task; what is stored of examples stays with the client."""
        return {name: state[name] for name in state if name.endswith(("sensitivity", "forgettability"))}

    def merge(self, state: State, shared: State) -> State:
        """See `Method.merge`; the heads of every task learned so far are selected by what all clients measured.

        A mean over clients ranks heads as their sum does: importance is scaled alike for all heads. Records that the
        client has already stored keep the heads that they were stored with. Heads drawn at `random` stay as they are.
        """
        state = super().merge(state, shared)
        if self.options.importance == "random":
            return state
        tasks = jnp.arange(self.num_tasks)

        def heads_after(index: Array) -> Array:
            def until(values: Array) -> Array:
                return jnp.where((tasks <= index).reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)

            return self._choose({name: until(values) for name, values in self.share(state).items()})

        learned = state["heads"] >= 0
        return {**state, "heads": jnp.where(learned, jax.lax.map(heads_after, tasks), state["heads"])}
