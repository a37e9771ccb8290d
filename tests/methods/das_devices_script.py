"""Measures DAS's importance and contrast on several meshes of eight host devices; prints JSON. Run as a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxcl.methods.das import Das, DasConfig
from jaxcl.models.batch import Batch
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout, put
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.compile import Compiler
from jaxcl.training.feed import place_batch

NETWORK = Network.create(
    LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, init_std=0.2)
)
MESHES = {
    "one": None,
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
}
LENGTH = 6


def make_rows(seed: int, real: int) -> dict[str, Any]:
    """Eight rows, of which the last only fill the batch."""
    random = np.random.default_rng(seed)
    lengths = np.where(np.arange(8) < real, random.integers(2, LENGTH + 1, 8), 0)
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    return {
        "tokens": random.integers(0, 32, (8, LENGTH)),
        "segments": segments,
        "positions": np.arange(LENGTH) * segments,
        "targets": random.integers(0, 32, (8, LENGTH)),
        "weights": segments,
        "task": np.zeros(8, int),
        "example": np.where(lengths > 0, np.arange(8), -1),
    }


class Domain:
    """A task of two batches, the second one uneven."""

    index, name, count = 0, "domain", 1

    def __init__(self, compiler: Compiler) -> None:
        self.key = put(jax.random.key(5), compiler.layout.replicated)
        self.compile = compiler

    def examples(self, limit: int | None = None) -> Iterator[Batch]:
        for seed, real in ((0, 8), (1, 3)):
            yield place_batch(make_rows(seed, real), self.compile.layout.batch)


def measure(mesh: dict[str, int] | None) -> dict[str, Any]:
    devices = None if mesh else jax.devices()[:1]
    layout = Layout.create(make_mesh(MeshConfig(**(mesh or {})), devices), NETWORK.axes(), NETWORK.shapes())
    compiler = Compiler(layout)
    params = put(jax.jit(NETWORK.init)(jax.random.key(1)), layout.params)
    method = Das(DasConfig(), NETWORK, 1)
    task = Domain(compiler)
    state = method.prepare(params, put(method.init(params), layout.replicated), task)
    state = method.consolidate(params, state, task)
    terms = compiler(method.loss)(params, state, next(task.examples()), task.key)
    tables = {name: np.asarray(value).ravel().tolist() for name, value in method.tables(state).items()}
    return tables | {name: [float(term.sum), float(term.count)] for name, term in terms.items()}


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    json.dump({name: measure(mesh) for name, mesh in MESHES.items()}, sys.stdout)
