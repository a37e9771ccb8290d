"""How long a training step takes to trace and compile with two layers and with eight, and how soon `--help` answers.

    python -m benchmarks.compile_time [--rounds 5] [--layers 2,8,32]

Prints one JSON object. Every compilation runs in a fresh process without a compilation cache, depths in turn;
`ratio` is the median over the rounds of (deepest / shallowest). Layers are stacked and scanned, so it should be
about 1. `help_seconds` is the median of whole processes `jaxcl --help`; `help_imports_jax` says whether jax came with
it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any


def compile_once(layers: int) -> dict[str, float]:
    """Seconds to trace and to compile the step of method `sequential` on a decoder of so many layers."""
    import jax

    from jaxcl.methods.sequential import Sequential
    from jaxcl.models.batch import Batch
    from jaxcl.models.llama import LlamaConfig
    from jaxcl.models.network import Network
    from jaxcl.sharding.layout import Layout
    from jaxcl.sharding.mesh import MeshConfig, make_mesh
    from jaxcl.training.optimizer import OptimizerConfig
    from jaxcl.training.trainer import Trainer

    shape = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_heads": 8}
    network = Network.create(LlamaConfig(**shape, num_layers=layers, max_length=512))
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    trainer = Trainer(Sequential(Sequential.Options(), network, 1), OptimizerConfig(), layout, accumulate=1, seed=0)
    tokens: Any = jax.ShapeDtypeStruct((4, 512), "int32")
    row: Any = jax.ShapeDtypeStruct((4,), "int32")
    weights: Any = jax.ShapeDtypeStruct((4, 512), "float32")
    batch = Batch(tokens, tokens, tokens, None, tokens, weights, row, row, packed=False)
    jax.jit(lambda: 0)()  # starting the backend is no compilation
    started = time.perf_counter()
    lowered = trainer.jitted_step.lower(trainer.target, batch, trainer.key)
    traced = time.perf_counter()
    program = lowered.compile()
    return {
        "trace": traced - started,
        "compile": time.perf_counter() - traced,
        "instructions": float(str(program.as_text()).count(" = ")),
    }


def in_fresh_process(layers: int) -> dict[str, float]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "benchmarks.compile_time", "--worker", str(layers)]
    return json.loads(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)


def help_seconds(rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jaxcl", "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return taken


def help_imports_jax() -> bool:
    code = "import sys; from jaxcl.cli import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return run.stdout.rstrip().endswith("True")


def measure(rounds: int, depths: list[int]) -> dict[str, object]:
    taken: dict[int, list[dict[str, float]]] = {layers: [] for layers in depths}
    for number in range(rounds):
        for layers in depths if number % 2 else depths[::-1]:
            taken[layers].append(in_fresh_process(layers))

    def seconds(layers: int) -> list[float]:
        return [one["trace"] + one["compile"] for one in taken[layers]]

    ratios = [deep / shallow for deep, shallow in zip(seconds(max(depths)), seconds(min(depths)), strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "depths": {
            layers: {name: statistics.median(one[name] for one in rows) for name in rows[0]}
            for layers, rows in taken.items()
        },
        "help_seconds": statistics.median(help_seconds(rounds)),
        "help_imports_jax": help_imports_jax(),
        "rounds": rounds,
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each depth is compiled")
    parser.add_argument("--layers", default="2,8", help="depths, separated by commas")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(compile_once(options.worker)))
    else:
        print(json.dumps(measure(options.rounds, [int(layers) for layers in options.layers.split(",")]), indent=2))


if __name__ == "__main__":
    main()
