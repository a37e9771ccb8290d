"""What DAS costs: its importance beside a forward/backward pass, its step beside a plain one, in every variant.

    python -m benchmarks.das_cost [--model roberta] [--rounds 10] [--batch 32] [--only own_trained,...]

Prints one JSON object. Everything is compiled first and then run in turn, round by round, so that all see the same
moods of the machine. `ratio` is the median over the rounds of seconds divided by those of the plain step (of the
forward/backward pass, for importance) of the same round, with quartiles; `processor_ratio` is the same for processor
time, which neighbours on a shared machine disturb less. `temporary_megabytes` is what the compiled program holds
beside its arguments and results.

Variants of the step: of `das`, by what it holds (`pull`, `mask`, both); of `das_paper`, by pass of the anchor and
gradient of the gated pass: `own_trained` is the plain recipe of four passes. `contrast_in_one_batch` and
`all_in_one_batch` are `own_trained` with three or all four passes fused to one
pass over a batch in which every example stands three or four times, gated in its last copy: the same loss
(`fused_difference`: largest relative difference of its gradient on a small network without noise).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.program import Program, machine, run_in_turn
from jaxcl.functional.contrastive import contrast, pool
from jaxcl.functional.importance import ImportanceSums
from jaxcl.functional.soft_masks import soft_masks
from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.passes.losses import language_model_loss, language_model_terms
from jaxcl.methods.sequential import Sequential
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.layers import dropout
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

VOCAB, LENGTH, MASKED = 8192, 128, 0.15
SHAPES: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_size": 256, "intermediate_size": 1024, "num_layers": 6, "num_heads": 4},
    "llama": {"hidden_size": 256, "intermediate_size": 688, "num_layers": 8, "num_heads": 4, "tie_embeddings": True},
}


def make_network(model: str, **changes: Any) -> Network:
    values = {"vocab_size": VOCAB, "max_length": LENGTH, **SHAPES[model], **changes}
    return Network.create(RobertaConfig(**values) if model == "roberta" else LlamaConfig(**values))


def rows(model: str, batch: int, vocab: int = VOCAB) -> Any:
    """Random tokens; 15% of the positions are scored for the encoder, all for the decoder."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab, (batch, LENGTH + 1))
    fields: dict[str, Any] = {
        "tokens": tokens[:, :-1],
        "segments": np.ones((batch, LENGTH)),
        "positions": np.tile(np.arange(LENGTH), (batch, 1)),
        "task": np.zeros(batch),
        "example": np.arange(batch),
        "packed": False,
    }
    if model == "llama":
        return {**fields, "targets": tokens[:, 1:], "weights": np.ones((batch, LENGTH))}
    count = round(MASKED * LENGTH)
    predict = np.sort(np.argsort(random.random((batch, LENGTH)), axis=1)[:, :count], axis=1)
    targets = np.take_along_axis(tokens, predict, axis=1)
    return {**fields, "predict": predict, "targets": targets, "weights": np.ones((batch, count))}


class ContrastInOneBatch(DasPaper):
    """Anchors, positives and past in one pass."""

    def _contrast(self, params: Any, importance: Gates, batch: Batch, anchor: Any, key: Any) -> Term:
        states = _side_by_side(self, params, importance, batch, 3, key)
        return _contrast_of(self, states, batch)


class AllInOneBatch(DasPaper):
    """The language-model pass in the same pass as well. For models with dropout: all its rows draw alike."""

    def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
        """See `Method.loss`."""
        states = _side_by_side(self, params, state["importance"], batch, 4, key)
        loss = language_model_loss(self.network, params, states[:, 0], batch, self.options.loss_chunk)
        return {"loss": loss, "contrast": _contrast_of(self, states[:, 1:], batch)}


def _side_by_side(method: DasPaper, params: Any, importance: Gates, batch: Batch, copies: int, key: Any) -> Any:
    """States `[batch, copies, length, embed]`; the last copy is gated."""
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), batch)

    def gates_of_rows(past: Any) -> Any:
        layers, units = past.shape
        gates = jnp.ones((layers, batch.size, copies, units)).at[:, :, -1].set(past[:, None])
        return gates.reshape(layers, batch.size * copies, units)

    states = method.network.hidden(
        params,
        repeated,
        gates=jax.tree.map(gates_of_rows, importance),
        dropout_key=key,
        dropout_rate=method._noise_rate(),
    ).states
    return states.reshape(batch.size, copies, *states.shape[1:])


def _contrast_of(method: DasPaper, states: Any, batch: Batch) -> Term:
    anchors, positives, negatives = (pool(states[:, copy], batch.segments) for copy in range(3))
    mask = jnp.any(batch.segments != 0, axis=1)
    total, count = contrast(anchors, positives, negatives, mask, method.options.temperature)
    return Term(total, count, method.options.contrast_weight)


STEPS: dict[str, Callable[[Network], Method]] = {
    "plain": lambda network: Sequential(Sequential.Options(), network, 1),
    "pull": lambda network: Das(DasOptions(hold="pull"), network, 1),
    "pull_full": lambda network: Das(DasOptions(hold="pull", resolution="full"), network, 1),
    "mask": lambda network: Das(DasOptions(hold="mask"), network, 1),
    "mask_and_pull": lambda network: Das(DasOptions(hold="both"), network, 1),
    "no_contrast": lambda network: DasPaper(DasPaperOptions(contrast_weight=0), network, 1),
    "own_trained": lambda network: DasPaper(DasPaperOptions(anchor="own"), network, 1),
    "own_fixed": lambda network: DasPaper(DasPaperOptions(anchor="own", negatives="fixed"), network, 1),
    "language_model_trained": lambda network: DasPaper(DasPaperOptions(anchor="language_model"), network, 1),
    "language_model_fixed": lambda network: DasPaper(
        DasPaperOptions(anchor="language_model", negatives="fixed"), network, 1
    ),
    "contrast_in_one_batch": lambda network: ContrastInOneBatch(DasPaperOptions(anchor="own"), network, 1),
    "all_in_one_batch": lambda network: AllInOneBatch(DasPaperOptions(anchor="own"), network, 1),
}


def step_program(method: Method, layout: Layout, params: Any, batch: Batch) -> Program:
    """The step of `jaxcl run`, with half of every unit's importance taken."""
    optimizer = OptimizerConfig(learning_rate=1e-4, weight_decay=0.01)
    trainer = Trainer(method, optimizer, layout, accumulate=1, seed=0)
    state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, params)), 1000)
    if isinstance(method, Das | DasPaper):
        half = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), state.method_state["importance"])
        state = trainer.with_method_state(state, {**state.method_state, "importance": half})
    return Program(trainer.jitted_step, state, batch, trainer.key, carried=True)


def importance_programs(network: Network, params: Any, batch: Batch) -> dict[str, Program]:
    key = jax.random.key(0)
    das = {proxy: DasPaper(DasPaperOptions(proxy=proxy), network, 1) for proxy in ("outputs", "pooled")}
    second = Das(DasOptions(), network, 1)
    sums = ImportanceSums.zero(network.gates())

    def loss(params: Any, batch: Batch, key: Any) -> Any:
        term = language_model_terms(network, params, batch, key, DasPaperOptions().loss_chunk)["loss"]
        return term.sum / term.count

    return {
        "forward_backward": Program(jax.jit(jax.value_and_grad(loss)), params, batch, key),
        "forward": Program(jax.jit(loss), params, batch, key),
        "drawn": Program(jax.jit(second.add_drawn), second.no_sums(), params, batch, key),
        "true": Program(jax.jit(second.add_true), second.no_sums(), params, batch, key),
        "domain": Program(jax.jit(das["outputs"].add_domain), sums, params, batch, key),
        "general_outputs": Program(jax.jit(das["outputs"].add_general), sums, params, batch, key),
        "general_pooled": Program(jax.jit(das["pooled"].add_general), sums, params, batch, key),
    }


def dropout_programs(network: Network, batch: int) -> dict[str, Program]:
    """Dropout of one layer's attention probabilities, and the same drawn by `jax.random`."""
    probabilities = jnp.ones((batch, network.num_heads, LENGTH, LENGTH))

    def by_bernoulli(x: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0.0)

    return {
        "bernoulli": Program(jax.jit(by_bernoulli), probabilities, jax.random.key(0)),
        "dropout": Program(jax.jit(lambda x, key: dropout(x, 0.1, key)), probabilities, jax.random.key(0)),
    }


def fused_difference(model: str) -> float:
    """Largest difference of gradients between separate and fused passes, relative to the largest gradient."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "vocab_size": 32}
    silent = {"hidden_dropout": 0.0, "attention_dropout": 0.0} if model == "roberta" else {}
    network = make_network(model, **small, **silent)
    params = network.init(jax.random.key(0))
    batch = place_batch(
        rows(model, 4, 32), Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes()).batch
    )
    gates = jax.tree.map(lambda leaf: 0.2 + 0.6 * (jnp.arange(leaf.size) % 2).reshape(leaf.shape), network.gates())

    gradients = []
    for kind in (DasPaper, ContrastInOneBatch, AllInOneBatch):
        method = kind(DasPaperOptions(anchor="own", proxy_dropout=0.0), network, 1)

        def total(params: Any, method: DasPaper = method) -> Any:
            terms = method.loss(params, {"importance": gates}, batch, jax.random.key(0))
            return sum(term.weight * term.sum / term.count for term in terms.values())

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(total))(params)))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in gradients[0])
    return max(
        float(jnp.max(jnp.abs(one - other))) / largest
        for fused in gradients[1:]
        for one, other in zip(gradients[0], fused, strict=True)
    )


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    network = make_network(model)
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    params = jax.jit(network.init)(jax.random.key(0))
    batch = place_batch(rows(model, options.batch), layout.batch)
    wanted = set(options.only.split(",")) | {"plain"} if options.only else set(STEPS)
    if model == "llama":
        wanted.discard("all_in_one_batch")  # the decoder's own loss has no noise, the contrast has
    groups = {
        "importance": importance_programs(network, params, batch),
        "step": {name: step_program(STEPS[name](network), layout, params, batch) for name in STEPS if name in wanted},
        "dropout": dropout_programs(network, options.batch),
    }
    run_in_turn([program for group in groups.values() for program in group.values()], options.rounds)
    masks = jax.eval_shape(lambda: soft_masks(network.units(), network.shapes(), vars(network.gates()), "mean"))
    size = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in (("params", params), ("masks", masks))
    }
    return {
        **{
            group: {name: program.facts(next(iter(members.values()))) for name, program in members.items()}
            for group, members in groups.items()
        },
        "fused_difference": fused_difference(model),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bytes": {**size, "masks_share": size["masks"] / size["params"]},
        "config": network.config.model_dump(exclude_defaults=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("roberta", "llama"), help="one of the two shapes; default: both")
    parser.add_argument("--rounds", type=int, default=10, help="times everything is run, after one to warm up")
    parser.add_argument("--batch", type=int, default=32, help="rows of 128 tokens")
    parser.add_argument("--only", default="", help="variants of the step, with commas between; default: all")
    options = parser.parse_args()
    models = [options.model] if options.model else ["roberta", "llama"]
    result = {
        "settings": {"batch": options.batch, "length": LENGTH, "masked": MASKED, "rounds": options.rounds},
        **{model: measure(model, options) for model in models},
        **machine(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
