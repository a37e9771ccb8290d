"""Learns two tasks with a method on a mesh of host devices and writes what came out as JSON. Run as a program.

Arguments: the file to write, then the pairs of case and mesh to run, as `case:mesh`. Run as one of several processes,
it takes its share of every batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.data.plan import Shape
from jaxcl.methods.base import Method
from jaxcl.methods.das import Das, DasOptions
from jaxcl.methods.das_paper import DasPaper, DasPaperOptions
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.models.vision_config import VisionConfig, vision_of
from jaxcl.sharding.layout import Layout, put
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.sharding.processes import initialize
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.stored import Collate
from jaxcl.training.task import RunningTask, signal_records
from jaxcl.training.trainer import Trainer
from tests.tiny.vision import VISION

STEPS = 8, 12
ROWS, LENGTH, PREDICT, VOCAB = 16, 8, 4, 32
MESHES = {
    "1": {"data": 1},
    "8x1": {"data": 8},
    "2x4": {"fsdp": 2, "tensor": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "4": {"fsdp": 2, "tensor": 2},
    "fsdp": {"fsdp": 8},
    "4x2": {"data": 4, "tensor": 2},
    "2x4 data": {"data": 2, "fsdp": 4},
}
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "intermediate_size": 24, "num_layers": 2, "init_std": 0.2}
ENCODER = RobertaConfig(**SIZES, hidden_size=16, num_heads=4, max_length=LENGTH)
DECODER = LlamaConfig(**SIZES, hidden_size=16, num_heads=4, num_kv_heads=2)
EXPERTS = LlamaConfig(
    **SIZES,
    hidden_size=16,
    num_heads=4,
    num_experts=8,
    experts_per_token=2,
    expert_size=6,
    normalise_top_k=True,
    router_loss_weight=0.1,
)
TILES = 2  # images per row
SEEING = DECODER.model_copy(update={"vision": VisionConfig(**VISION | {"init_std": 0.2})})
UNEVEN = LlamaConfig(**SIZES, hidden_size=18, num_heads=9, num_kv_heads=3)
# Codes of 8 bits would turn a last bit into a whole step, and the paper's weight makes it a thousand times larger.
SEEKR = SeekrOptions(
    layer_budget=2, head_budget=3, query_budget=5, store_logits=8, store_attention="float32", attention_weight=10.0
)
SEEKR_ROWS = SEEKR.model_copy(update={"distil_heads": "rows"})
SEEKR_SEES = SEEKR_ROWS.model_copy(update={"modality_budgets": (1, 2, 0, 0), "modality_weights": (1.0, 2.0, 0.5)})


@dataclasses.dataclass(frozen=True)
class Case:
    config: Any
    method: type[Method]
    options: Any


CASES = {
    # A last bit may change which token is drawn; steep masks and pulls would show it.
    "das": Case(DECODER, Das, DasOptions(hold="both")),
    "das_paper encoder": Case(ENCODER, DasPaper, DasPaperOptions()),
    "das_paper uneven": Case(UNEVEN, DasPaper, DasPaperOptions()),
    "das_paper experts": Case(EXPERTS, DasPaper, DasPaperOptions()),
    "seekr": Case(DECODER, Seekr, SEEKR),
    "seekr rows": Case(DECODER, Seekr, SEEKR_ROWS),
    "seekr uneven": Case(UNEVEN, Seekr, SEEKR_ROWS),
    "das sees": Case(SEEING, Das, DasOptions(hold="both", targets="true")),
    "das_paper sees": Case(SEEING, DasPaper, DasPaperOptions()),
    "seekr sees": Case(SEEING, Seekr, SEEKR_SEES),
}


def make_rows(seed: int, task: int, real: int = ROWS, *, images: bool = False) -> dict[str, Any]:
    """This process's share of rows of uneven length, of which all but `real` only fill the batch; with `images`."""
    random = np.random.default_rng(seed)
    lengths = np.where(np.arange(ROWS) < real, random.integers(2, LENGTH + 1, ROWS), 0)[:, None]
    segments = (np.arange(LENGTH) < lengths).astype(np.int32)
    rows = {
        "tokens": random.integers(2, VOCAB, (ROWS, LENGTH)),
        "segments": segments,
        "positions": np.arange(LENGTH) * segments,
        "predict": random.integers(0, np.maximum(lengths, 1), (ROWS, PREDICT)),
        "targets": random.integers(2, VOCAB, (ROWS, PREDICT)),
        "weights": (random.random((ROWS, PREDICT)) < 0.7) * (lengths > 0),
        "task": np.full(ROWS, task),
        "example": np.where(lengths[:, 0] > 0, np.arange(ROWS), -1),
    }
    if images:
        place = np.arange(LENGTH) - 1  # of 4 image tokens, after one of text
        shown = (segments == 1) & (place >= 0) & (place < 4)
        rows["pixels"] = random.integers(0, 256, (ROWS, TILES, 8, 8, 3)).astype(np.uint8)
        rows["image_index"] = np.where(shown, place + 4 * (np.arange(ROWS) % TILES)[:, None], -1)
    size = ROWS // jax.process_count()
    part = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    return {name: value[part] for name, value in rows.items()}


class Examples:
    """A task's examples: a full batch and one that fillers complete."""

    def __init__(self, task: int, images: bool) -> None:
        self.task, self.images = task, images

    def once(self, limit: int | None, seed: int) -> Iterator[dict[str, Any]]:
        yield make_rows(100 + self.task, self.task, images=self.images)
        yield make_rows(200 + self.task, self.task, real=5, images=self.images)


class Remembered:
    """The examples of a task that its memory keeps."""

    def __init__(self, task: int, images: bool) -> None:
        self.task, self.images = task, images

    def once(self, limit: int | None, seed: int) -> Iterator[dict[str, Any]]:
        yield make_rows(300 + self.task, self.task, real=13, images=self.images)


class Run:
    """Two tasks learned by one method on one mesh; every third step of the second replays the first."""

    def __init__(self, case: Case, sizes: dict[str, int]) -> None:
        network = Network.create(case.config)
        self.images = vision_of(case.config) is not None
        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
        self.layout = Layout.create(mesh, network.axes(), network.shapes())
        self.method = case.method(case.options, network, 2)
        # A larger eps than usual: dividing by the root of almost nothing makes a step of a last bit.
        optimizer = OptimizerConfig(learning_rate=0.01, warmup=2, weight_decay=0.1, eps=1e-2, clip_norm=None)
        self.trainer = Trainer(self.method, optimizer, self.layout, accumulate=1, seed=0)
        self.whole = jax.jit(lambda tree: tree, out_shardings=self.layout.replicated)
        self.state = self.trainer.init(jax.jit(network.init)(jax.random.key(1)))
        self.losses: list[float] = []
        self.records: dict[int, dict[str, np.ndarray]] = {}
        self.gradients: Any = None

    def learn(self, index: int) -> None:
        before = jax.tree.map(jnp.copy, self.state.params)
        task = self._task(index, before, stage="before")
        prepared = self.method.prepare(self.state.params, self.state.method_state, task)
        state = self.trainer.start_task(self.trainer.with_method_state(self.state, prepared), STEPS[index])
        memory = self._memory() if self.records else None
        for step in range(STEPS[index]):
            rows = memory if memory is not None and step % 3 == 2 else self._rows(20 * index + step, index)
            state, metrics = self.trainer.step(state, place_batch(rows, self.layout.batch))
            self.losses.append(float(metrics["loss"]))
            if self.gradients is None:  # Adam's first moment after the first step is 1 - b1 times the gradient
                self.gradients = flat(self.whole(optax.tree_utils.tree_get(state.opt_state, "mu")))
        task = self._task(index, before, stage="after")
        state = self.trainer.with_method_state(state, self.method.consolidate(state.params, state.method_state, task))
        if index == 0:
            self.records = dict(signal_records(self.trainer, state, task))
        self.state = state

    def result(self) -> dict[str, Any]:
        method_state = self.state.method_state
        return {
            "losses": self.losses,
            "gradients": self.gradients,
            "params": flat(self.whole(self.state.params)),
            "state": flat(self.whole({name: value for name, value in method_state.items() if name != "heads"})),
            "heads": np.asarray(method_state["heads"]).tolist() if "heads" in method_state else None,
            "specs": {name: spec_of(leaf) for name, leaf in named(self.state).items()},
            "compilations": self.trainer.jitted_step._cache_size(),
        }

    def _rows(self, seed: int, index: int) -> dict[str, Any]:
        return make_rows(seed, index, images=self.images)

    def _task(self, index: int, before: Any, stage: str) -> RunningTask:
        return RunningTask(
            index=index,
            name=f"task{index}",
            count=2,
            key=put(jax.random.key(10 * index + (stage == "after")), self.layout.replicated),
            seed=0,
            pipeline=Examples(index, self.images),
            memory=Remembered(index, self.images),
            params_before=lambda: before,
            compiler=self.trainer.compile,
        )

    def _memory(self) -> dict[str, Any]:
        """The first task's remembered rows, with what was stored beside them."""
        rows = next(Remembered(0, self.images).once(None, 0))
        records = [self.records.get(int(example)) for example in rows["example"]]
        target = self.trainer.target
        teacher = Collate(self.method, target.params, target.method_state)(records, Shape(LENGTH, PREDICT))
        return {**rows, "origin": "memory", "teacher": teacher}


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def spec_of(array: jax.Array) -> str:
    """The array's partition, without the whole axes at the end."""
    spec = tuple(array.sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return str(spec)


def flat(tree: Any) -> dict[str, list[float]]:
    return {name: np.asarray(leaf, np.float64).ravel().tolist() for name, leaf in named(tree).items()}


def main(pairs: list[str]) -> dict[str, Any]:
    results = {}
    for pair in pairs:
        case, mesh = pair.split(":")
        run = Run(CASES[case], MESHES[mesh])
        for index in range(len(STEPS)):
            run.learn(index)
        results[pair] = run.result()
    return results


if __name__ == "__main__":
    initialize()
    jax.config.update("jax_disable_most_optimizations", True)
    Path(sys.argv[1]).write_text(json.dumps(main(sys.argv[2:])))
