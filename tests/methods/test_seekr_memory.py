"""What SEEKR's programs hold, read off the compiled programs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxcl.functional.heads import HeadSums
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.batch import Batch
from tests.tiny.batches import StandInTask, make_batch
from tests.tiny.networks import init, tiny_llama

LENGTH, ROWS, HEADS = 128, 2, 4
MAPS = 4 * ROWS * HEADS * LENGTH**2
"""Bytes of the attention maps of one layer."""


def batch_of(seed: int = 0) -> Batch:
    return make_batch((LENGTH,) * ROWS, length=LENGTH, seed=seed)


def method_of(layers: int) -> Seekr:
    network = tiny_llama(num_layers=layers, num_heads=HEADS, max_length=LENGTH)
    return Seekr(SeekrOptions(layer_budget=layers, head_budget=1), network, 2)


def temporary(layers: int, name: str) -> int:
    """Bytes that a program of the measurements holds beside its arguments and results."""
    method = method_of(layers)
    params, sums = (
        method.network.shapes(),
        jax.eval_shape(lambda: HeadSums.zero(method.network.num_layers, method.network.num_heads)),
    )
    args = (sums, params, params) if name == "add_forgettability" else (sums, params)
    return jax.jit(getattr(method, name)).lower(*args, batch_of()).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["add_sensitivity", "add_forgettability"])
def test_importance_holds_the_maps_of_one_layer_at_most(name: str) -> None:
    few, many = (temporary(layers, name) for layers in (2, 8))
    assert few > MAPS / 4  # else the comparison says nothing
    assert many - few < MAPS / 4


def test_importance_holds_no_more_for_more_samples() -> None:
    method = method_of(2)
    params = init(method.network)
    alive: list[int] = []

    class Counting(StandInTask):
        """Counts the bytes of all arrays whenever a batch is asked for."""

        def memory(self) -> Iterator[Batch]:
            for seed in range(6):
                alive.append(sum(array.nbytes for array in jax.live_arrays()))
                yield batch_of(seed)

    state: Any = method.init(params)
    state = method.consolidate(params, state, Counting([], before=params))
    assert jnp.any(state["sensitivity"] > 0)
    # From the third on; the first two find less because sums and the batch before do not exist yet.
    assert max(alive[3:]) <= alive[2]
    assert alive[-1] - alive[1] < MAPS / 4
