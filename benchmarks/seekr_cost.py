"""What SEEKR costs: its replay step beside a plain one, its importance beside its replay, and what its store holds.

    python -m benchmarks.seekr_cost [--rounds 10] [--batch 4] [--scored 128]

Prints one JSON object. A decoder of 8 layers and 8 heads learns four short tasks one after another under SEEKR at a
budget of 75% of the layers, 12.5% of the heads and 100 queries; its rows have 512 tokens, the last `--scored` of which
are scored. The remembered rows of all four tasks, each with its own heads, make the batch that is measured.

Everything is compiled first and then run in turn, round by round, so that all see the same moods of the machine.
`ratio` is the median over the rounds of seconds divided by those of the plain step on the same rows in the same round,
with quartiles; `processor_ratio` is the same for processor time, which neighbours on a shared machine disturb less.
`importance` is both measures of a batch together, against a plain and against a replay step on it.
`temporary_megabytes` is what the compiled program holds beside its arguments and results. `store` counts the bytes of a
remembered row, in all its arrays and in the compressed file, and what float32 maps of all heads and float32 logits at
the scored positions would take. What a store loses is told by `jaxcl teacher` on a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.program import Program, machine, run_in_turn
from jaxcl.data.teacher_store import Record, write_records
from jaxcl.functional.heads import HeadSums
from jaxcl.methods.base import Method
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.methods.sequential import Sequential
from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

VOCAB, LENGTH, TASKS, STEPS = 8192, 512, 4, 10
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_layers": 8, "num_heads": 8}
BUDGET: dict[str, Any] = {
    "distil_heads": "rows",
    "logit_weight": 0.5,
    "layer_budget": 0.75,
    "head_budget": 0.125,
    "query_budget": 100,
    "attention_weight": 1000.0,
}
# As `seekr` is by default, with these budgets.
VALUES: dict[str, Any] = {**BUDGET, "distil_heads": "values", "logit_weight": 0.75, "attention_weight": "auto"}
EXACT: dict[str, Any] = {"store_logits": 0, "store_attention": "float32"}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, schedule="constant")


def rows(task: int, count: int, scored: int, seed: int) -> Any:
    """Tokens that each stand a little above their predecessor; how little is the task."""
    random = np.random.default_rng((seed, task))
    steps = random.integers(0, 8, (count, LENGTH + 1)) * (task + 1)
    tokens = (random.integers(0, VOCAB, (count, 1)) + np.cumsum(steps, axis=1)) % VOCAB
    return {
        "tokens": tokens[:, :-1],
        "segments": np.ones((count, LENGTH)),
        "positions": np.tile(np.arange(LENGTH), (count, 1)),
        "predict": np.tile(np.arange(LENGTH - scored, LENGTH), (count, 1)),
        "targets": tokens[:, -scored:],
        "weights": np.ones((count, scored)),
        "task": np.full(count, task),
        "example": np.arange(count),
        "packed": False,
    }


class Bench:
    """Four tasks learned under SEEKR, and what was remembered of them.

    Attributes:
      params: of the last task's model.
      state: SEEKR's, with the heads of every task.
      records: what each kind of store holds of each remembered row.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.network = Network.create(LlamaConfig(vocab_size=VOCAB, max_length=LENGTH, **SHAPE))
        self.layout = Layout.create(make_mesh(MeshConfig()), self.network.axes(), self.network.shapes())
        self.methods = {
            "compact": self.method(**BUDGET),
            "compact_all_queries": self.method(**{**BUDGET, "query_budget": 0}),
            "exact": self.method(**BUDGET, **EXACT),
            "values": self.method(**VALUES),
        }
        self.records: dict[str, list[Record]] = {name: [] for name in self.methods}
        self.params = jax.jit(self.network.init)(jax.random.key(0))
        self.state = self.methods["compact"].init(self.params)
        trainer = self.trainer(self.methods["compact"])
        for task in range(TASKS):
            self._learn(trainer, task)

    def method(self, **changes: Any) -> Seekr:
        """SEEKR with some options."""
        return Seekr(SeekrOptions(**changes), self.network, TASKS)

    def trainer(self, method: Method) -> Trainer:
        """A method's compiled step."""
        return Trainer(method, OPTIMIZER, self.layout, accumulate=1, seed=0)

    def _learn(self, trainer: Trainer, task: int) -> None:
        before, scored = self.params, self.options.scored
        state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, before)), STEPS)
        for step in range(STEPS):
            state, _ = trainer.step(state, place_batch(rows(task, 4, scored, seed=1 + step), self.layout.batch))
        self.params = state.params

        batch = self.batch({**rows(task, self.options.batch // TASKS, scored, seed=0), "origin": "memory"})
        method, zero = self.methods["compact"], HeadSums.zero(self.network.num_layers, self.network.num_heads)
        sensitivity = jax.jit(method.add_sensitivity)(zero, self.params, batch)
        forgettability = jax.jit(method.add_forgettability)(zero, before, self.params, batch)
        self.state = jax.jit(method.select)(self.state, sensitivity, forgettability, jnp.int32(task))
        for name, one in self.methods.items():
            signals = jax.device_get(jax.jit(one.signals)(self.params, self.state, batch, jax.random.key(task)))
            self.records[name] += [
                {field: values[row] for field, values in signals.items()} for row in range(batch.size)
            ]

    def batch(self, fields: Any) -> Batch:
        """A batch on the devices."""
        return place_batch(fields, self.layout.batch)

    def remembered(self, store: str | None) -> Batch:
        """The remembered rows of all tasks with what a store holds beside them, or as rows of a task."""
        parts = [rows(task, self.options.batch // TASKS, self.options.scored, seed=0) for task in range(TASKS)]
        fields = {
            name: value if name == "packed" else np.concatenate([part[name] for part in parts])
            for name, value in parts[0].items()
        }
        if store is None:
            return self.batch(fields)
        records = self.records[store]
        teacher = {field: np.stack([record[field] for record in records]) for field in records[0]}
        return self.batch({**fields, "origin": "memory", "teacher": teacher})

    def step_program(self, method: Method, batch: Batch) -> Program:
        """The step of `jaxcl run`."""
        trainer = self.trainer(method)
        state = trainer.start_task(trainer.init(jax.tree.map(jnp.copy, self.params)), 1000)
        if isinstance(method, Seekr):
            # The running means of `attention_weight: auto` are the only state that not all of them have.
            state = trainer.with_method_state(state, {**state.method_state, **jax.tree.map(jnp.copy, self.state)})
        return Program(trainer.jitted_step, state, batch, trainer.key, carried=True)

    def programs(self) -> dict[str, Program]:
        """Everything that is timed, compiled."""
        plain = Sequential(Sequential.Options(), self.network, TASKS)
        batch = self.remembered("compact")
        seekr, zero = self.methods["compact"], HeadSums.zero(self.network.num_layers, self.network.num_heads)
        before = jax.tree.map(jnp.copy, self.params)
        return {
            "plain": self.step_program(plain, self.remembered(None)),
            "seekr": self.step_program(seekr, batch),
            "seekr_all_queries": self.step_program(
                self.methods["compact_all_queries"], self.remembered("compact_all_queries")
            ),
            "seekr_exact_store": self.step_program(self.methods["exact"], self.remembered("exact")),
            "seekr_values": self.step_program(self.methods["values"], self.remembered("values")),
            "seekr_auto": self.step_program(self.method(**{**BUDGET, "attention_weight": "auto"}), batch),
            "seekr_outputs_only": self.step_program(self.method(**{**BUDGET, "attention_weight": 0.0}), batch),
            "seekr_attention_only": self.step_program(self.method(**{**BUDGET, "logit_weight": 0.0}), batch),
            "sensitivity": Program(jax.jit(seekr.add_sensitivity), zero, self.params, batch),
            "forgettability": Program(jax.jit(seekr.add_forgettability), zero, before, self.params, batch),
        }

    def store(self) -> dict[str, Any]:
        """Bytes of a remembered row."""
        layers, heads, scored = self.network.num_layers, self.network.num_heads, self.options.scored
        full = 4 * (layers * heads * LENGTH**2 + scored * VOCAB)
        facts: dict[str, Any] = {"full_maps_and_logits": full}
        with tempfile.TemporaryDirectory() as folder:
            for name, records in self.records.items():
                path = Path(folder) / name
                write_records(path, enumerate(records))
                fields = {field: values.nbytes for field, values in records[0].items()}
                disk, total = path.stat().st_size / len(records), sum(fields.values())
                facts[name] = {"fields": fields, "bytes": total, "on_disk": disk, "share": total / full}
        return facts


def together(parts: list[Program], base: Program) -> float:
    """Median over the rounds of the seconds of some programs together, divided by those of one."""
    rounds = zip(*(program.seconds[1:] for program in (base, *parts)), strict=True)
    return statistics.median(sum(seconds) / first for first, *seconds in rounds)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    store, programs = bench.store(), bench.programs()
    print("everything is compiled and runs in turn", file=sys.stderr, flush=True)
    run_in_turn(programs.values(), options.rounds)
    measures = [programs[name] for name in ("sensitivity", "forgettability")]
    heads = np.asarray(bench.state["heads"])
    return {
        "settings": {**vars(options), "length": LENGTH, **BUDGET},
        "steps": {name: program.facts(programs["plain"]) for name, program in programs.items()},
        "importance": {f"against_{name}": together(measures, programs[name]) for name in ("plain", "seekr")},
        "heads_by_layer": [np.bincount(task[:, 0], minlength=SHAPE["num_layers"]).tolist() for task in heads],
        "store": store,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(bench.params)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="times everything is run, after one to warm up")
    parser.add_argument("--batch", type=int, default=4, help=f"remembered rows, a multiple of the {TASKS} tasks")
    parser.add_argument("--scored", type=int, default=128, help=f"positions of a row's {LENGTH} that are scored")
    result = {
        **measure(parser.parse_args()),
        **machine(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
