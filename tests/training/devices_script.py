"""Trains a tiny decoder on several meshes of eight host devices; prints what came out as JSON. Run as a program.

With the argument `bfloat16`, the params are held in bfloat16 and their low bits in the state; with `images`, the
decoder sees.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.functional.terms import Term, Terms
from jaxcl.methods.base import Method
from jaxcl.methods.ewc import Ewc, EwcOptions
from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.lora import LoraConfig
from jaxcl.models.network import Network
from jaxcl.models.vision_config import VisionConfig
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.low_bits import widen
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.state import TrainState
from jaxcl.training.trainer import Trainer
from tests.tiny.vision import VISION

NETWORK = Network.create(
    LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2)
)
# What the model holds in bfloat16 it computes with in float32, so that only sums differ from mesh to mesh.
HALVED = Network.create(
    NETWORK.config.model_copy(update={"compute": NETWORK.config.compute.model_copy(update={"param_dtype": "bfloat16"})})
)
ADAPTED = Network.create(NETWORK.config.model_copy(update={"lora": LoraConfig(targets=("query", "out", "down"))}))
SEEING = Network.create(
    NETWORK.config.model_copy(update={"vision": VisionConfig(**VISION | {"num_layers": 2, "shuffle": 2})})
)
MESHES = {"one": None, "data": {"data": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
STEPS = 4
COLLECTIVES = re.compile(r" (all-[a-z-]+?|collective-permute|reduce-scatter)(?:-start)?\(")


class Plain(Method):
    def init(self, params: Any) -> Any:
        return {"before": params, "heads": jnp.zeros((2, 4))}

    def loss(self, params: Any, state: Any, batch: Batch, key: Any) -> Terms:
        states = self.network.hidden(params, batch).states
        scores = jax.nn.log_softmax(self.network.logits(params, states))
        picked = -jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        return {"lm": Term(jnp.sum(picked * batch.weights), jnp.sum(batch.weights))}


def make_rows(seed: int, images: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 32, (16, 12))
    shown = {
        "pixels": random.integers(0, 256, (16, 2, 8, 8, 3)).astype(np.uint8),
        "image_index": np.where(tokens % 5 == 0, tokens % 2, -1),
    }
    return (shown if images else {}) | {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(12), (16, 1)),
        "targets": np.roll(tokens, -1, 1),
        "weights": (random.random((16, 12)) < 0.6).astype(np.float32),
        "task": np.zeros(16, int),
        "example": np.arange(16),
    }


def train(mesh: dict[str, int] | None, network: Network) -> dict[str, Any]:
    devices = None if mesh else jax.devices()[:1]
    layout = Layout.create(make_mesh(MeshConfig(**(mesh or {})), devices), network.axes(), network.shapes())
    optimizer = OptimizerConfig(learning_rate=0.01, warmup=2, weight_decay=0.1)
    sees = network.config.vision is not None
    trainer = Trainer(Plain(None, network, 1), optimizer, layout, accumulate=2, seed=0)
    state = trainer.start_task(trainer.init(network.init(jax.random.key(1))), STEPS)
    losses, first = [], {}
    for step in range(STEPS):
        state, metrics = trainer.step(state, place_batch(make_rows(step, sees), layout.batch))
        losses.append(float(metrics["loss"]))
        first = whole(state) if step == 0 else first
    program = ""
    if mesh == MESHES["data"]:
        batch = place_batch(make_rows(0, sees), layout.batch)
        program = trainer.jitted_step.lower(trainer.target, batch, trainer.key).compile().as_text()
    state, kept = with_a_bad_row(trainer, state)
    name = "kernel" if network.config.lora is None else "lora_b"
    query = state.params["blocks"]["attention"]["query"][name]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == query.shape]
    ewc = Ewc(EwcOptions(), network, 1)
    none = trainer.compile(ewc.no_fisher)(state.params)
    sums = trainer.compile(ewc.add_fisher)(none, state.params, place_batch(make_rows(0, sees), layout.batch))
    fisher = sums.total["blocks"]["attention"]["query"][name]
    low_bits = named(state.low_bits)
    return {
        "kept": kept,
        "low_bits": {path: str(tuple(leaf.sharding.spec)) for path, leaf in low_bits.items()},
        "like_params": all(named(state.params)[path].sharding == leaf.sharding for path, leaf in low_bits.items()),
        "used": [path for path, leaf in low_bits.items() if np.any(leaf)],
        "fisher": np.asarray(fisher).ravel().tolist(),
        "fisher_spec": str(tuple(fisher.sharding.spec)),
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "first": first,
        "params": whole(state),
        "specs": [
            str(tuple(leaf.sharding.spec))
            for leaf in (query, state.method_state["before"]["blocks"]["attention"]["query"][name], *moments)
        ],
        "compilations": trainer.jitted_step._cache_size(),
        "collectives": sorted(
            set(re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(", program))
        ),
    }


def with_a_bad_row(trainer: Trainer, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """A step with a row that is not finite, on one device, and what it changed on any of them."""

    def shards(state: TrainState) -> list[Any]:
        part = {"params": state.params, "opt_state": state.opt_state, "rest": (state.method_state, state.low_bits)}
        return [np.array(shard.data) for leaf in jax.tree.leaves(part) for shard in leaf.addressable_shards]

    rows = make_rows(0, trainer.method.network.config.vision is not None)
    rows["weights"][-1, 0] = np.nan
    before = shards(state)
    state, metrics = trainer.step(state, place_batch(rows, trainer.layout.batch))
    same = [np.array_equal(old, new) for old, new in zip(before, shards(state), strict=True)]
    return state, {"skipped": float(metrics["skipped"]), "same": sum(same), "shards": len(same)}


def whole(state: TrainState) -> dict[str, list[float]]:
    """The params in float32, of both halves where they have two."""
    return {
        path: np.asarray(leaf).ravel().tolist() for path, leaf in named(widen(state.params, state.low_bits)).items()
    }


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


if __name__ == "__main__":
    if sys.argv[1:] == ["bfloat16"]:
        results = {name: train(mesh, HALVED) for name, mesh in MESHES.items()}
    elif sys.argv[1:] == ["images"]:
        results = {name: train(mesh, SEEING) for name, mesh in MESHES.items()}
    else:
        results = {name: train(mesh, NETWORK) for name, mesh in MESHES.items()}
        results |= {f"{name}, adapters": train(MESHES[name], ADAPTED) for name in ("one", "all")}
    json.dump(results, sys.stdout)
