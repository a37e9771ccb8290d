"""The matrix products of one training step alone, by XLA and by torch: what no other code of a step can beat.

`benchmarks.train_step` runs them in turn with the steps. On many processors XLA's products take longer than torch's,
which call oneDNN or MKL; the step's ratio divided by the products' ratio is what is jaxcl's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """Of a LLaMA-style decoder and a batch."""

    batch: int
    length: int
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def rows(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.length


def linear_shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's projections: query, key, value, out, gate, up, down."""
    wide, inner = sizes.hidden, sizes.intermediate
    return [(wide, wide)] * 4 + [(wide, inner)] * 2 + [(inner, wide)]


def operations(sizes: Sizes) -> float:
    """Multiplications and additions of all products of a step, attention as if nothing were hidden."""
    linear = sizes.layers * sum(a * b for a, b in linear_shapes(sizes)) + sizes.hidden * sizes.vocab
    attention = sizes.layers * 2 * sizes.batch * sizes.length**2 * sizes.hidden
    return 3 * 2 * (sizes.rows * linear + attention)


def arrays(sizes: Sizes, linear: list[tuple[int, int]], attention: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """Factors and cotangent of each product: `x [.., n, k]`, `kernel [.., k, m]`, `dy [.., n, m]`."""
    random = np.random.default_rng(0)
    for inputs, outputs in linear:
        yield tuple(
            random.standard_normal(shape, np.float32)
            for shape in ((sizes.rows, inputs), (inputs, outputs), (sizes.rows, outputs))
        )
    if attention:
        pairs, depth = sizes.batch * sizes.heads, sizes.hidden // sizes.heads
        for k, m in ((depth, sizes.length), (sizes.length, depth)):
            shapes = (pairs, sizes.length, k), (pairs, k, m), (pairs, sizes.length, m)
            yield tuple(random.standard_normal(shape, np.float32) for shape in shapes)


def in_jax(sizes: Sizes, dtype: str) -> Callable[[], None]:
    """All products of a step by XLA: a layer's, once per layer, and those of the output head."""
    import jax
    import jax.numpy as jnp

    def products(into: list[Any], triples: list[tuple[Any, ...]]) -> list[Any]:
        """Their results, in the memory of the ones before: allocating anew is not what is timed."""
        results = []
        for x, kernel, dy in triples:
            results += [x @ kernel, dy @ kernel.mT, x.mT @ dy]
        return results

    def placed(linear: list[tuple[int, int]], attention: bool) -> list[tuple[Any, ...]]:
        return [tuple(jnp.asarray(one, dtype) for one in triple) for triple in arrays(sizes, linear, attention)]

    compiled = jax.jit(products, donate_argnums=0, keep_unused=True)
    layer, head = placed(linear_shapes(sizes), True), placed([(sizes.hidden, sizes.vocab)], False)
    results = [jax.jit(lambda triples: products([], triples))(triples) for triples in (layer, head)]

    def run() -> None:
        for _ in range(sizes.layers):
            results[0] = jax.block_until_ready(compiled(results[0], layer))
        results[1] = jax.block_until_ready(compiled(results[1], head))

    return run


def in_torch(sizes: Sizes, dtype: str, device: str = "cpu") -> Callable[[], None]:
    """The same by torch."""
    import torch

    def placed(linear: list[tuple[int, int]], attention: bool) -> list[tuple[Any, ...]]:
        kind = getattr(torch, dtype)
        return [
            tuple(torch.from_numpy(one).to(device, kind) for one in triple)
            for triple in arrays(sizes, linear, attention)
        ]

    def factors(triples: list[tuple[Any, ...]]) -> list[tuple[Any, Any, Any]]:
        pairs = [pair for x, kernel, dy in triples for pair in ((x, kernel), (dy, kernel.mT), (x.mT, dy))]
        return [(one, other, torch.matmul(one, other)) for one, other in pairs]

    layer, head = placed(linear_shapes(sizes), True), placed([(sizes.hidden, sizes.vocab)], False)
    products = factors(layer) * sizes.layers + factors(head)

    def run() -> None:
        with torch.no_grad():
            for one, other, into in products:
                torch.matmul(one, other, out=into)
            if device == "cuda":
                torch.cuda.synchronize()

    return run


def processor() -> dict[str, Any]:
    """The processor's name and the instruction sets that matter to products; empty where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {"name": fields.get("model name", "unknown"), "instruction_sets": [name for name in known if name in flags]}
