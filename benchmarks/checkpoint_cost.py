"""What checkpoints cost: training with one every 50 steps against training without, in turn in one process.

    python -m benchmarks.checkpoint_cost --rounds 7 --hidden 512 --layers 6

Prints one JSON object: the ratio of the times of each pair (quartiles; the aim is a median of at most 1.03), how long
the loop waits per checkpoint, and what comes when a run goes on: comparing all files with their checksums, restoring. A
block with checkpoints ends when the last one is on disk, so its time includes a wait that a longer run hides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.config import parse_config
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.folder import RunFolder
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.checksums import check_checksums
from jaxcl.training.loop import train_task
from jaxcl.training.state import TrainState


def content(hidden: int, layers: int, output: Path) -> dict[str, Any]:
    """A run of plain fine-tuning with AdamW, whose state is three times the params."""
    return {
        "output": str(output),
        "model": {
            "architecture": "llama",
            "vocab_size": 2048,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_layers": layers,
            "num_heads": hidden // 64,
            "max_length": 128,
        },
        "tokenizer": {"vocab_size": 2048, "train_rows": 500},
        "data": {"length": 128},
        "tasks": [{"name": "topics", "source": "stdlib:python_topics", "train": 256, "test": 8}],
        "method": "sequential",
        "training": {"batch_size": 8, "steps": 1000, "sinks": ["jsonl"]},
        "evaluation": {"batch_size": 8},
    }


class Runs:
    """Blocks of steps of one model, with checkpoints or without."""

    def __init__(self, parts: Components, folder: Path, every: int, saves: int) -> None:
        self.parts, self.folder, self.every = parts, folder, every
        self.steps = every * saves + 1  # the loop saves only before its last step
        self.state: TrainState = parts.trainer.init(initial_params(parts))
        self.waited: list[float] = []

    def block(self, save: Callable[[TrainState, Any], object] | None) -> float:
        """Seconds of a block."""
        parts = self.parts
        pipeline = parts.training_pipeline(0)
        rows = pipeline.train(0, 0, 1)
        state = parts.trainer.start_task(self.state, self.steps, first=True)
        started = time.perf_counter()
        self.state = train_task(
            parts.trainer,
            state,
            parts.trainer.feed(rows, prefetch=parts.config.training.prefetch),
            total=self.steps,
            task=0,
            name="topics",
            log_every=10,
            save=save,
            save_every=self.every if save else 0,
            progress=False,
        )
        jax.block_until_ready(self.state.params)
        seconds = time.perf_counter() - started
        rows.close()
        return seconds

    def saving(self) -> float:
        """Seconds of a block with checkpoints, until the last one is on disk."""
        with Checkpoints(self.folder) as checkpoints:

            def save(state: TrainState, data: Any) -> None:
                started = time.perf_counter()
                checkpoints.save(state, progress={"task": 0}, data=data)
                self.waited.append(time.perf_counter() - started)

            seconds = self.block(save)
            started = time.perf_counter()
            checkpoints.wait()
            return seconds + time.perf_counter() - started


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=2, help="checkpoints per block")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = parse_config(content(options.hidden, options.layers, Path(scratch) / "run"))
        parts = build(config, RunFolder(Path(config.output)))
        runs = Runs(parts, Path(scratch) / "checkpoints", options.every, options.saves)
        runs.block(None)  # compiles
        runs.saving()
        runs.waited.clear()
        pairs = []
        for number in range(options.rounds):
            order = (True, False) if number % 2 else (False, True)
            pairs.append({saves: runs.saving() if saves else runs.block(None) for saves in order})
        ratios = [pair[True] / pair[False] for pair in pairs]
        with Checkpoints.reading(runs.folder) as checkpoints:
            (saved,) = checkpoints.notes()
            place = runs.folder / str(saved.number)
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            checking = [timed(lambda: check_checksums(place)) for _ in range(5)]
            restoring = [timed(lambda: checkpoints.restore(parts.trainer.target, saved)) for _ in range(5)]
        step = float(np.median([pair[False] for pair in pairs])) / runs.steps
        found = {
            "params": sum(leaf.size for leaf in jax.tree.leaves(runs.state.params)),
            "checkpoint_bytes": size,
            "every": options.every,
            "step_seconds": round(step, 4),
            "ratio": [round(float(value), 4) for value in np.quantile(ratios, (0.25, 0.5, 0.75))],
            "rounds": options.rounds,
            "wait_seconds_per_checkpoint": round(float(np.median(runs.waited)), 4),
            "verify_seconds": round(float(np.median(checking)), 4),
            "restore_seconds": round(float(np.median(restoring)), 4),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
