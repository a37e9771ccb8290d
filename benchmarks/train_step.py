"""How long a training step takes in jaxcl and in torch: the same model, weights, data and optimizer on one device.

    python -m benchmarks.train_step [--rounds 15] [--batch 4] [--packed] [--dtype bfloat16] [--device cuda]

Prints one JSON object. Each side runs in a process of its own and does one step at a time, in turn, so that both see
the same moods of the machine; `ratio` is the median over the rounds of (jaxcl's seconds / torch's seconds).
`products_ratio` is that of the step's matrix products alone (`benchmarks.step_products`), and `beyond_products` the
median of one over the other: what jaxcl's own code makes of the products that it is given. `loss_difference` is the
largest relative difference between the two sides' losses over the first steps: it says that both do the same thing.

`--dtype bfloat16` lets both sides compute in bfloat16 (torch by autocast), which is faster where the processor has AMX.
`--device cuda` puts both on a GPU, with a larger model.

Needs torch (for a CPU, its CPU build) as well as jaxcl's own dependencies.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_products import Sizes, in_jax, in_torch, operations, processor

# By device: the larger one has enough work in each kernel for a GPU.
SIZES = {
    "cpu": Sizes(batch=4, length=512, vocab=8192, hidden=256, intermediate=688, layers=8, heads=8),
    "cuda": Sizes(batch=8, length=1024, vocab=32768, hidden=1024, intermediate=2816, layers=12, heads=16),
}
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
COMPARED_STEPS = 5


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Of the device's model, with the rows that were asked for."""
    sizes = SIZES[options.device]
    return sizes if options.batch is None else sizes._replace(batch=options.batch)


def tokens(sizes: Sizes) -> np.ndarray:
    """`[batch, length + 1]`, each a little above its predecessor, so that there is something to learn."""
    random = np.random.default_rng(0)
    steps = random.integers(0, 8, (sizes.batch, sizes.length + 1))
    return ((random.integers(0, sizes.vocab, (sizes.batch, 1)) + np.cumsum(steps, axis=1)) % sizes.vocab).astype(
        np.int64
    )


def jaxcl_step(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], float], dict[str, Any]]:
    """The step of `jaxcl run` with method `sequential`; writes its initial weights to `folder`."""
    import jax

    from jaxcl.methods.sequential import Sequential
    from jaxcl.models.compute import Compute
    from jaxcl.models.llama import LlamaConfig
    from jaxcl.models.network import Network
    from jaxcl.sharding.layout import Layout
    from jaxcl.sharding.mesh import MeshConfig, make_mesh
    from jaxcl.training.feed import place_batch
    from jaxcl.training.optimizer import OptimizerConfig
    from jaxcl.training.trainer import Trainer
    from jaxcl.weights import save_hf

    sizes = sizes_of(options)
    network = Network.create(
        LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
            max_length=sizes.length,
            compute=Compute(dtype=options.dtype),
        )
    )
    layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        b1=BETAS[0],
        b2=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP,
    )
    method = Sequential(Sequential.Options(), network, 1)
    trainer = Trainer(method, optimizer, layout, accumulate=1, seed=0)
    params = jax.jit(network.init)(jax.random.key(0))
    save_hf(folder, network, params)
    state = trainer.start_task(trainer.init(params), 1000)
    text = tokens(sizes)
    rows, ones = np.zeros(sizes.batch, np.int32), np.ones((sizes.batch, sizes.length))
    fields: Any = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segments": ones,
        "positions": np.tile(np.arange(sizes.length), (sizes.batch, 1)),
        "weights": ones,
        "task": rows,
        "example": rows,
        "packed": options.packed,
    }
    batch = place_batch(fields, layout.batch)
    started = time.perf_counter()
    memory = trainer.jitted_step.lower(state, batch, trainer.key).compile().memory_analysis()
    facts = {
        "compile_seconds": time.perf_counter() - started,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6 if memory is not None else None,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, facts


def torch_step(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], float], dict[str, Any]]:
    """The same with transformers' model, its scaled-dot-product attention, and torch's fused AdamW."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", use_cache=False, dtype=torch.float32)
    model.to(options.device).train()
    kernels = [param for param in model.parameters() if param.ndim > 1]
    scales = [param for param in model.parameters() if param.ndim == 1]
    groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    text = torch.from_numpy(tokens(sizes_of(options))).to(options.device)
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step, {"threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in model.parameters())}


def work(options: argparse.Namespace) -> None:
    """Does what each line asks for, `step` or `products`; says how long it took, on the clock and in processor time."""
    make: Callable[..., Any] = jaxcl_step if options.worker == "jaxcl" else torch_step
    products = in_jax if options.worker == "jaxcl" else partial(in_torch, device=options.device)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    step, facts = make(options, Path(options.folder))
    run_products = products(sizes_of(options), options.dtype)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = step() if line.strip() == "step" else run_products()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        answer = {"seconds": seconds, "processor": processor, "faults": after.ru_minflt - before.ru_minflt}
        print(json.dumps({**answer, "loss": loss}), file=answers, flush=True)


class Worker:
    """A side's process."""

    def __init__(self, side: str, options: argparse.Namespace, folder: str) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.train_step",
            "--worker",
            side,
            "--folder",
            folder,
            "--batch",
            str(sizes_of(options).batch),
            "--dtype",
            options.dtype,
            "--device",
            options.device,
        ]
        command += ["--packed"] if options.packed else []
        # Both sides are on one GPU, so jax may not reserve most of its memory.
        environment = {**os.environ, "JAX_PLATFORMS": options.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._read()

    def do(self, what: str) -> dict[str, float]:
        """Lets it do one `step`, or the `products` of one."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; see its error above")
        return json.loads(line)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights")
        workers = {side: Worker(side, options, weights) for side in ("jaxcl", "torch")}
        steps: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        products: dict[str, list[float]] = {side: [] for side in workers}
        for number in range(COMPARED_STEPS + options.rounds):
            order = list(workers) if number % 2 else list(workers)[::-1]
            for side in order:
                steps[side].append(workers[side].do("step"))
            for side in order:
                products[side].append(workers[side].do("products")["seconds"])
        for worker in workers.values():
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.wait()
    losses = {side: [step["loss"] for step in taken[:COMPARED_STEPS]] for side, taken in steps.items()}
    # The first steps warm caches and allocators up.
    taken = {side: all_steps[COMPARED_STEPS:] for side, all_steps in steps.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(taken["jaxcl"], taken["torch"], strict=True)]
    alone = {side: seconds[COMPARED_STEPS:] for side, seconds in products.items()}
    of_products = [a / b for a, b in zip(alone["jaxcl"], alone["torch"], strict=True)]
    beyond = [step / product for step, product in zip(ratios, of_products, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "products_ratio": statistics.median(of_products),
        "products_ratio_quartiles": statistics.quantiles(of_products, n=4)[::2],
        "beyond_products": statistics.median(beyond),
        "beyond_products_quartiles": statistics.quantiles(beyond, n=4)[::2],
        "ratio_of_fastest": min(s["seconds"] for s in taken["jaxcl"]) / min(s["seconds"] for s in taken["torch"]),
        "loss_difference": max(abs(a / b - 1) for a, b in zip(losses["jaxcl"], losses["torch"], strict=True)),
        **{
            side: {
                "seconds": statistics.median(s["seconds"] for s in rows),
                "fastest_seconds": min(s["seconds"] for s in rows),
                "processor_seconds": statistics.median(s["processor"] for s in rows),
                "page_faults": statistics.median(s["faults"] for s in rows),
                "products_seconds": statistics.median(alone[side]),
                "products_gigaflops": operations(sizes_of(options)) / statistics.median(alone[side]) / 1e9,
                **workers[side].facts,
            }
            for side, rows in taken.items()
        },
        "losses": losses,
        "settings": {**sizes_of(options)._asdict(), "packed": options.packed, "rounds": options.rounds}
        | {"dtype": options.dtype, "device": options.device},
        "cores": os.cpu_count(),
        "processor": processor(),
        "machine": platform.machine(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "torch", "transformers")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps that are measured")
    parser.add_argument("--batch", type=int, help="rows; default: 4, on a GPU 8")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products"
    )
    parser.add_argument("--packed", action="store_true", help="let jaxcl mask as if rows could hold several documents")
    parser.add_argument("--worker", choices=("jaxcl", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    else:
        print(json.dumps(measure(options), indent=2))


if __name__ == "__main__":
    main()
