"""What images cost: the tower's share of a step, and SEEKR's replay step whose attention rows are split by modality.

    python -m benchmarks.vision_cost [--rounds 10] [--batch 4] [--images 2]

Prints one JSON object. A decoder of 8 layers and 8 heads with a tower of 6 layers sees `--images` images of 112 pixels
per row, 64 patches and 16 tokens each, in rows of 256 tokens, the last 64 of which are scored. It learns a task for
some steps; then the rows are remembered under SEEKR, with heads by what it measured.

Everything is compiled first and then run in turn, round by round, so that all see the same moods of the machine.
`steps` compares each step with a plain one on the same rows, images included; `blind` is that step without the images,
so that 1 less its ratio is the share of tower and connector. `split` compares replay steps with weights for the parts
(`modality_weights`), and with heads by block (`modality_budgets`), with the replay step that has neither; `measures`
compares what is measured by block of attention with what is measured of all keys together. Quartiles are over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.program import Program, machine, run_in_turn
from jaxcl.methods.base import Method
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.vision_config import VisionConfig
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

VOCAB, LENGTH, SCORED, STEPS = 4096, 256, 64, 10
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_layers": 8, "num_heads": 8}
VISION = VisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_layers=6,
    num_heads=6,
    image_size=112,
    patch_size=14,
    shuffle=2,
    image_token_id=6,
)
BUDGET: dict[str, Any] = {
    "distil_heads": "rows",
    "layer_budget": 0.75,
    "head_budget": 0.125,
    "query_budget": 100,
    "attention_weight": 1000.0,
}
WEIGHTS = {"modality_weights": (1.0, 1.0, 2.0)}
BLOCKS = {"modality_budgets": (2, 2, 2, 2)}  # as many heads as head_budget
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, schedule="constant")


def rows(count: int, images: int, seed: int) -> Any:
    """Words after images, which are noise."""
    random = np.random.default_rng(seed)
    tokens = random.integers(7, VOCAB, (count, LENGTH + 1))
    place, shown = np.arange(LENGTH), images * VISION.image_tokens
    tokens[:, 1 : 1 + shown] = VISION.image_token_id
    index = np.where((place > 0) & (place <= shown), place - 1, -1)
    side = VISION.image_size
    return {
        "tokens": tokens[:, :-1],
        "segments": np.ones((count, LENGTH)),
        "positions": np.tile(place, (count, 1)),
        "predict": np.tile(np.arange(LENGTH - SCORED, LENGTH), (count, 1)),
        "targets": tokens[:, -SCORED:],
        "weights": np.ones((count, SCORED)),
        "task": np.zeros(count),
        "example": np.arange(count),
        "packed": False,
        "pixels": random.integers(0, 256, (count, images, side, side, 3)).astype(np.uint8),
        "image_index": np.tile(index, (count, 1)),
    }


class Bench:
    """A model that learned a task, and what SEEKR remembers of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.network = Network.create(LlamaConfig(vocab_size=VOCAB, max_length=LENGTH, **SHAPE, vision=VISION))
        self.layout = Layout.create(make_mesh(MeshConfig()), self.network.axes(), self.network.shapes())
        self.rows = rows(options.batch, options.images, seed=0)
        self.before = jax.jit(self.network.init)(jax.random.key(0))
        trainer = self.trainer(self.method())
        state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, self.before)), STEPS)
        for step in range(STEPS):
            seen = rows(options.batch, options.images, seed=1 + step)
            state, _ = trainer.step(state, place_batch(seen, self.layout.batch))
        self.params = state.params

    def method(self, **changes: Any) -> Seekr:
        """SEEKR with some options."""
        return Seekr(SeekrOptions(**{**BUDGET, **changes}), self.network, 1)

    def trainer(self, method: Method) -> Trainer:
        """A method's compiled step."""
        return Trainer(method, OPTIMIZER, self.layout, accumulate=1, seed=0)

    def batch(self, **changes: Any) -> Batch:
        """The rows on the devices, with other fields."""
        fields: Any = {name: value for name, value in {**self.rows, **changes}.items() if value is not None}
        return place_batch(fields, self.layout.batch)

    def selected(self, method: Seekr) -> Any:
        """A method's state with the heads that it selects."""
        batch = self.batch(origin="memory")
        measured = method.measurements(self.before, self.params, method.init(self.params), batch, jax.random.key(0))
        parts = measured["sensitivity"], measured["forgettability"]
        return jax.jit(method.select)(method.init(self.params), *parts, jnp.int32(0))

    def replay(self, **changes: Any) -> Program:
        """SEEKR's replay step on the remembered rows."""
        method = self.method(**changes)
        state = self.selected(method)
        plain = self.batch(origin="memory")
        teacher = jax.device_get(jax.jit(method.signals)(self.params, state, plain, jax.random.key(0)))
        return self.step(method, self.batch(origin="memory", teacher=teacher), state)

    def step(self, method: Method, batch: Batch, own: Any = None) -> Program:
        """The step of `jaxcl run`."""
        trainer = self.trainer(method)
        state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, self.params)), 1000)
        if own is not None:
            state = trainer.with_method_state(state, jax.tree.map(jnp.copy, own))
        return Program(trainer.jitted_step, state, batch, trainer.key, carried=True)

    def measure(self, name: str, **changes: Any) -> Program:
        """What is measured of a batch between tasks."""
        method = self.method(**changes)

        def run(before: Any, params: Any, batch: Batch) -> Any:
            return method.measurements(before, params, method.init(params), batch, jax.random.key(0))[name]

        return Program(jax.jit(run), self.before, self.params, self.batch(origin="memory"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    sequential = Sequential(Sequential.Options(), bench.network, 1)
    steps = {
        "plain": bench.step(sequential, bench.batch()),
        "blind": bench.step(sequential, bench.batch(pixels=None, image_index=None)),
        "replay": bench.replay(),
    }
    split = {"weights": bench.replay(**WEIGHTS), "blocks": bench.replay(**BLOCKS)}
    names = "sensitivity", "forgettability"
    whole = {name: bench.measure(name) for name in names}
    blocks = {name: bench.measure(name, **BLOCKS) for name in names}
    print("everything is compiled and runs in turn", file=sys.stderr, flush=True)
    run_in_turn([*steps.values(), *split.values(), *whole.values(), *blocks.values()], options.rounds)
    facts = {name: program.facts(steps["plain"]) for name, program in steps.items()}
    return {
        "settings": {**vars(options), "length": LENGTH, **BUDGET, **WEIGHTS, **BLOCKS},
        "steps": facts,
        "share_of_tower": 1 - facts["blind"]["ratio"],
        "split": {name: program.facts(steps["replay"]) for name, program in split.items()},
        "measures": {name: program.facts(whole[name]) for name, program in blocks.items()},
        "parameters": bench.network.num_params,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="times everything is run, after one to warm up")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--images", type=int, default=2, help="images per row")
    print(json.dumps({**measure(parser.parse_args()), **machine()}, indent=2))


if __name__ == "__main__":
    main()
