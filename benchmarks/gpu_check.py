"""Whether jaxcl is right and fast on the GPU of this machine. Sized for a few minutes there; not run on one yet.

    python -m benchmarks.gpu_check [--parts kernels,precision,memory,das,seekr,torch] [--out gpu_check.json] [--small]

Prints one JSON object per part as soon as it is done, and last a line that says which checks failed; ends with 1 if one
did. `--out` gets all of it. `--small` is for trying the script itself, on a CPU too, where the kernel is XLA's.

- `kernels`: attention by the fast kernel in bfloat16 against explicit attention in float32, values and gradients. It
  may be off by twice as much as explicit attention in bfloat16 is. Time, by XLA's and by the fast kernel.
- `precision`: the same 30 steps in float32, with bfloat16 activations, and with bfloat16 params as well. The loss must
  fall in each; with float32 params it must end within 2% of float32's.
- `memory`: what a step of the compiled program holds beside its arguments at 4,096 tokens per row, by either kernel,
  and what the device reports as its peak.
- `das`, `seekr`: their steps beside a plain step, see `benchmarks.das_cost` and `benchmarks.seekr_cost`.
- `torch`: the step beside that of transformers and torch on the same GPU, see `benchmarks.train_step`. Needs both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other parts and torch want memory too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import das_cost, seekr_cost
from benchmarks.program import Program, machine, run_in_turn
from jaxcl.methods.sequential import Sequential
from jaxcl.models.attention import attention, choose_kernel, explicit_attention
from jaxcl.models.compute import Compute, Kernel
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.feed import place_batch
from jaxcl.training.optimizer import OptimizerConfig
from jaxcl.training.trainer import Trainer

# What is kept of the tables of `das_cost` and `seekr_cost`.
_KEPT = ("ratio", "ratio_quartiles", "seconds", "temporary_ratio", "compile_seconds")
_DAS_STEPS = "pull,mask,mask_and_pull,language_model_trained"


class Case(NamedTuple):
    """A call of attention."""

    length: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    packed: bool = False
    window: int | None = None


CASES = {
    "causal": Case(1024),
    "grouped": Case(1024, heads=16, kv_heads=4, head_dim=128),
    "packed": Case(1024, packed=True),
    "window": Case(1024, window=256),
    "window, packed": Case(1024, window=256, packed=True),
    "encoder": Case(512, causal=False),
    "encoder, window": Case(512, causal=False, window=128),
}


def kernels(small: bool) -> dict[str, Any]:
    """The fast kernel against explicit attention."""
    facts: dict[str, Any] = {"kernel": choose_kernel("auto")}
    for name, case in CASES.items():
        if small:
            case = case._replace(length=64, window=case.window and 16)
        facts[name] = {**_errors(case), **_times(case, rows=2 if small else 8)}
    return facts


def _inputs(case: Case, rows: int, dtype: str) -> tuple[Any, ...]:
    """Queries, keys, values and segments: rows of one document and padding, or of two documents and padding."""
    random = np.random.default_rng(0)
    shapes = [(rows, case.length, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    segments = np.ones((rows, case.length), np.int32)
    segments[0, 3 * case.length // 4 :] = 0
    if case.packed:
        segments[:, case.length // 3 : 3 * case.length // 4] = 2
    return (*(jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes), segments)


def _loss(case: Case, kernel: Kernel | None) -> Callable[..., Any]:
    """Half the squares of what comes out at tokens; `None`: explicit attention."""

    def loss(query: Any, key: Any, value: Any, segments: Any) -> Any:
        fixed = {"segments": segments, "causal": case.causal, "scale": case.head_dim**-0.5, "packed": case.packed}
        fixed["window"] = case.window
        if kernel is None:
            out = explicit_attention(query, key, value, **fixed)
        else:
            out = attention(query, key, value, kernel=kernel, **fixed)
        out = jnp.where(segments[..., None, None] != 0, out, 0).astype(jnp.float32)
        return 0.5 * jnp.sum(out**2), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _errors(case: Case) -> dict[str, Any]:
    """Largest difference from float32, relative to the largest value, of what comes out and of each gradient."""

    def results(kernel: Kernel | None, dtype: str) -> list[np.ndarray]:
        # The same rounded inputs for all, so that only the computation differs.
        *arrays, segments = _inputs(case, 2, "bfloat16")
        with jax.default_matmul_precision("highest"):
            (_, out), gradients = _loss(case, kernel)(*(one.astype(dtype) for one in arrays), segments)
        return [np.asarray(one, np.float32) for one in (out, *gradients)]

    reference = results(None, "float32")

    def errors(found: list[np.ndarray]) -> list[float]:
        return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, reference, strict=True)]

    fast, explicit = errors(results("auto", "bfloat16")), errors(results(None, "bfloat16"))
    wrong = [
        name
        for name, one, other in zip(("values", "query", "key", "value"), fast, explicit, strict=True)
        if not one <= 2 * other
    ]
    return {"error": max(fast), "explicit_error": max(explicit), "wrong": wrong}


def _times(case: Case, rows: int) -> dict[str, float]:
    """Seconds of the forward and backward pass, by XLA's kernel and by the fast one."""
    inputs = _inputs(case, rows, "bfloat16")
    programs = {kernel: Program(_loss(case, kernel), *inputs) for kernel in ("xla", "auto")}
    run_in_turn(programs.values(), 10)
    seconds = {name: statistics.median(program.seconds[1:]) for name, program in programs.items()}
    return {"seconds": seconds["auto"], "xla_seconds": seconds["xla"], "ratio": seconds["auto"] / seconds["xla"]}


def _network(small: bool, length: int, **compute: Any) -> Network:
    shape = (256, 64, 176, 2, 4) if small else (32768, 1024, 2816, 12, 16)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    return Network.create(
        LlamaConfig(**dict(zip(names, shape, strict=True)), max_length=length, compute=Compute(**compute))
    )


class _Steps:
    """A network's plain training step on one fixed batch."""

    def __init__(self, network: Network, rows: int, length: int) -> None:
        layout = Layout.create(make_mesh(MeshConfig()), network.axes(), network.shapes())
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.1)
        self.trainer = Trainer(Sequential(Sequential.Options(), network, 1), optimizer, layout, accumulate=1, seed=0)
        params = jax.jit(network.init)(jax.random.key(0))
        self.state = self.trainer.start_task(self.trainer.init(params), 1000)
        steps = np.random.default_rng(0).integers(0, 8, (rows, length + 1))
        tokens = np.cumsum(steps, axis=1) % network.config.vocab_size
        none, ones = np.zeros(rows, np.int32), np.ones((rows, length))
        fields: Any = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones, "weights": ones}
        fields |= {"positions": np.tile(np.arange(length), (rows, 1)), "task": none, "example": none, "packed": False}
        self.batch = place_batch(fields, layout.batch)

    def losses(self, count: int) -> list[float]:
        """Those of some steps."""
        found = []
        for _ in range(count):
            self.state, metrics = self.trainer.step(self.state, self.batch)
            found.append(float(metrics["loss"]))
        return found


def precision(small: bool) -> dict[str, Any]:
    """What fewer bits do to the loss."""
    rows, length = (2, 32) if small else (8, 1024)
    kinds = {
        "float32": {},
        "bfloat16 activations": {"dtype": "bfloat16"},
        "bfloat16 params": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    }
    facts: dict[str, Any] = {}
    for name, compute in kinds.items():
        losses = _Steps(_network(small, length, **compute), rows, length).losses(30)
        facts[name] = {
            "first": losses[0],
            "last": losses[-1],
            "wrong": [] if losses[-1] < losses[0] else ["no descent"],
        }
    ratio = facts["bfloat16 activations"]["last"] / facts["float32"]["last"]
    facts["ratio"] = ratio
    facts["wrong"] = [] if abs(ratio - 1) < 0.02 else ["bfloat16 activations end elsewhere"]
    return facts


def memory(small: bool) -> dict[str, Any]:
    """Bytes of a step by kernel, and the device's peak."""
    rows, length = (2, 64) if small else (2, 4096)
    facts: dict[str, Any] = {"rows": rows, "length": length}
    for kernel in ("xla", "auto"):
        one = _Steps(_network(small, length, dtype="bfloat16", kernel=kernel), rows, length)
        program = Program(one.trainer.jitted_step, one.state, one.batch, one.trainer.key, carried=True)
        run_in_turn([program], 5)
        facts[kernel] = {
            "temporary_megabytes": program.temporary / 1e6,
            "seconds": statistics.median(program.seconds[1:]),
            "tokens_per_second": rows * length / statistics.median(program.seconds[1:]),
        }
        del one, program
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    return {**facts, "peak_megabytes": statistics_of_device.get("peak_bytes_in_use", 0) / 1e6}


def das(small: bool) -> dict[str, Any]:
    """Steps and importance of DAS."""
    rounds, batch = (2, 2) if small else (10, 128)
    options = argparse.Namespace(rounds=rounds, batch=batch, only="pull" if small else _DAS_STEPS)
    found = das_cost.measure("llama", options)
    return {group: _kept(found[group]) for group in ("step", "importance")}


def seekr(small: bool) -> dict[str, Any]:
    """Steps and importance of SEEKR, and what its store holds of a row."""
    found = seekr_cost.measure(argparse.Namespace(rounds=2 if small else 10, batch=4 if small else 32, scored=128))
    return {"steps": _kept(found["steps"]), "importance": found["importance"], "store": found["store"]}


def _kept(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: {field: row[field] for field in _KEPT} for name, row in rows.items()}


def torch(small: bool) -> dict[str, Any]:
    """The step beside torch's, in float32 and bfloat16; what comes out must agree."""
    facts: dict[str, Any] = {}
    for dtype in ("bfloat16",) if small else ("bfloat16", "float32"):
        command = [sys.executable, "-m", "benchmarks.train_step", "--dtype", dtype, "--rounds", "2" if small else "15"]
        command += ["--device", "cuda" if jax.default_backend() == "gpu" else "cpu", *(["--batch", "1"] * small)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if answer.returncode:
            facts[dtype] = {"wrong": [f"ended with {answer.returncode}"]}
            continue
        found = json.loads(answer.stdout)
        fine = found["loss_difference"] < (0.02 if dtype == "bfloat16" else 2e-3)
        facts[dtype] = {**found, "wrong": [] if fine else ["losses differ"]}
    return facts


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "kernels": kernels,
    "precision": precision,
    "memory": memory,
    "das": das,
    "seekr": seekr,
    "torch": torch,
}


def failures(facts: Any, place: str = "") -> Iterator[str]:
    """Everything that a part calls wrong, and where."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            if name == "wrong":
                yield from (f"{place}: {one}" for one in value)
            else:
                yield from failures(value, f"{place} {name}".strip())


def checked(name: str, small: bool) -> dict[str, Any]:
    """A part's facts and its time; an error is one of them, so that the other parts still run."""
    started = time.monotonic()
    try:
        facts = PARTS[name](small)
    except Exception as error:
        traceback.print_exc()
        facts = {"wrong": [f"{type(error).__name__}: {error}"]}
    return {**facts, "took": round(time.monotonic() - started, 1)}


def main() -> int:
    """Runs the parts; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between")
    parser.add_argument("--out", type=Path, help="file for all results")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    results: dict[str, Any] = machine()
    for name in names:
        results[name] = checked(name, options.small)
        print(json.dumps({name: results[name]}), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    found = list(failures(results))
    print("failed: " + "; ".join(found) if found else f"all checks passed on {results['device']}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
